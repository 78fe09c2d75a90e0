/* Use the panel on tests/web/page.py as a person would, and say what was seen: node page.cjs URL ROOT PICTURES */

const {drive, until} = require("./browser.cjs");

const [url, root, pictures] = process.argv.slice(2);
/** What the WebUIs' own script does for a click on a card: a LoRA's tag is added, or taken out with its words. */
function cardClicked(tabname, text) {
    const area = document.querySelector(`#${tabname}_prompt textarea`);
    const [, net, words] = text.match(/<([^:^>]+:[^:]+):[\d.]+>(.*)/);
    const before = area.value;
    area.value = before.replaceAll(/<([^:^>]+:[^:]+):[\d.]+>/g, (found, other) => (other === net ? "" : found));
    if (area.value === before) area.value += ` ${text}`;
    else area.value = area.value.replace(words, "").trim();
    area.dispatchEvent(new Event("input", {bubbles: true}));
}
const PROMPT = "a fox <lora:my_fox:1>, <lora:ink:0.9:0.8:dyn=3> (blue:1.2) <hypernet:x:1> <lyco:detail:0.6>";

async function look(page) {
    const text = (selector) => page.locator(selector);
    const area = (id) => text(`#${id} textarea`);
    const value = (id) => area(id).inputValue();
    const chips = (tab = "txt2img") => text(`#dynfuse_roles_${tab} .dynfuse-chip`);
    const words = async (tab) => (await chips(tab).allInnerTexts()).map((one) => one.replace(/\s+/g, " ").trim());
    const status = (tab = "txt2img") => text(`#dynfuse_roles_${tab} .dynfuse-status > div`).allInnerTexts();
    /** The status once it has this many lines. */
    const lines = (count) => until(status, (now) => now.length === count);
    const focused = () => page.evaluate(() => document.activeElement.getAttribute("aria-label"));
    /** The panel's values as Python gets them. */
    const read = async () => {
        await area("txt2img_values").fill("");
        let found = "";
        // A page that is not quite loaded on a busy machine loses a click.
        for (let tries = 0; tries < 3 && !found; tries++) {
            await text("#txt2img_read").click();
            found = await until(() => value("txt2img_values"), (now) => now);
        }
        return JSON.parse(found);
    };
    const click = async (index) => {
        await chips().nth(index).click();
        return value("txt2img_prompt");
    };
    const load = async () => {
        await area("txt2img_prompt").waitFor();
        await page.addStyleTag({path: `${root}/style.css`});
        await page.addScriptTag({path: `${root}/javascript/dynfuse.js`});
        await page.evaluate(`window.cardClicked = ${cardClicked}`);
        await text("#dynfuse_roles_img2img .dynfuse-status").waitFor({state: "attached"});
    };
    const control = (name, inside) => text(`#txt2img_${name} ${inside}`).first();
    const seen = {};

    await area("txt2img_prompt").waitFor();
    await page.evaluate(`window.cardClicked = ${cardClicked}`);
    const names = await page.evaluate(() => Object.getOwnPropertyNames(window).length);
    await load();
    seen.newNames = await page.evaluate(() => Object.getOwnPropertyNames(window).length) - names;
    seen.emptyStatus = await status();
    seen.defaults = await read();

    await area("txt2img_prompt").pressSequentially(PROMPT);
    seen.typed = {chips: await until(words, (now) => now.length === 3), status: await status()};

    seen.clicks = [];
    for (let turn = 0; turn < 3; turn++) seen.clicks.push(await click(0));
    await click(0);
    seen.secondTag = [await click(1), await click(1)];
    seen.both = {chips: await words(), unticked: await lines(2)};
    await control("enabled", "input").check();
    seen.both.status = await lines(1);
    seen.undone = [];
    for (let turn = 0; turn < 2; turn++) {
        await page.keyboard.press("Control+z");
        seen.undone.push(await value("txt2img_prompt"));
    }
    seen.undoneChips = await until(words, (now) => now[1]?.includes("plain"));

    await chips().nth(2).focus();
    await page.keyboard.press("Enter");
    seen.keys = [await value("txt2img_prompt")];
    await page.keyboard.press("Space");
    seen.keys.push(await value("txt2img_prompt"));
    seen.focusAfterKeys = await focused();
    await read();
    seen.inPython = await value("txt2img_prompt_in_python");

    await area("hires_prompt").fill("sharper <lora:crisp:0.5> <lora:ink:1:role=style>");
    seen.hires = {chips: await until(words, (now) => now.length === 5), status: await status()};
    await chips().nth(3).click();
    seen.hires.after = await value("hires_prompt");
    seen.hires.prompt = await value("txt2img_prompt");
    await area("hires_prompt").fill("");

    await area("txt2img_prompt").fill("<lora:fox:1:role=sbject>");
    seen.wrong = {chips: await until(words, (now) => now.length === 1), status: await status()};
    await area("txt2img_prompt").fill("<lora:fox:1,0:role=subject>");
    seen.unreadable = {chips: await until(words, (now) => now[0]?.includes("1,0")), status: await status()};
    await area("txt2img_prompt").fill("<lora:fox:1:role=subject> <lora:gone:1:role=style>");
    seen.unlisted = {status: await until(status, (now) => now[0]?.includes("not in")), chips: await words()};
    seen.unlisted.dashed = await text("#dynfuse_roles_txt2img .dynfuse-doubtful").allInnerTexts();
    await area("txt2img_prompt").fill("<lora:fox:1:role=subject> <lora:ink:1:role=style>");
    seen.listed = await until(status, (now) => now[0]?.startsWith("subject"));
    await area("txt2img_neg_prompt").fill("blurry <lora:detail:1>");
    seen.negative = await lines(2);
    await area("txt2img_neg_prompt").fill("");
    await area("txt2img_prompt").fill("");
    seen.emptied = await lines(1);

    await area("img2img_prompt").fill("<lora:other:1:role=style>");
    seen.tabs = {img2img: await until(() => words("img2img"), (now) => now.length), txt2img: await words("txt2img")};

    await control("enabled", "input").uncheck();
    await text(".card").hover();
    await page.locator(".dynfuse-card-button", {hasText: "S"}).click();
    seen.card = [await value("txt2img_prompt")];
    seen.cardTicks = {box: await control("enabled", "input").isChecked(), python: (await read()).enabled};
    await page.locator(".dynfuse-card-button", {hasText: "T"}).click();
    seen.card.push(await value("txt2img_prompt"));
    seen.cardOpened = await page.evaluate(() => window.cardOpened === true);
    const plainClick = async () => {
        await text(".card .name").click();
        return value("txt2img_prompt");
    };
    seen.plainClicks = [await plainClick(), await plainClick(), await plainClick()];
    await area("txt2img_prompt").fill("");
    await control("enabled", "input").uncheck();

    const balance = control("balance", "input[type=number]");
    await balance.fill("0.25");
    await balance.blur();
    await control("enabled", "input").check();
    await control("auto_balance", "input").uncheck();
    seen.chosen = await read();

    const rule = control("strategy", "input");
    const preset = async (name, becomes, lean) => {
        await control("preset", "input").click();
        await text(`ul.options li[aria-label="${name}"]`).click();
        return {
            rule: await until(() => rule.inputValue(), (now) => now === becomes),
            balance: await until(async () => Number(await balance.inputValue()), (now) => now === lean),
        };
    };
    seen.presets = [
        await preset("paper", "kl", 0),
        await preset("subject first", "kl-cfg", -0.4),
        await preset("default", "kl-cfg", 0),
    ];
    const choose = async (name, help) => {
        await rule.click();
        await text(`ul.options li[aria-label="${name}"]`).click();
        const line = () => text("#txt2img_rule_help .dynfuse-help").innerText();
        const said = await until(line, (now) => now.startsWith(help));
        const greyed = await until(() => balance.isDisabled(), (now) => now === (name === "sum"));
        return {help: said, greyed};
    };
    seen.sum = await choose("sum", "Adds both");
    seen.kl = await choose("kl", "Each layer");

    // A row of the panel's part for guidance is seen or not: pictures, and what only nudges have.
    const shown = async () => ({
        compared: await text("#txt2img_subject_references").isVisible(),
        nudged: await text("#txt2img_nudge_strength").isVisible(),
    });
    const tick = async (name, on) => {
        await control(name, "input").setChecked(on);
        return shown();
    };
    const keep = async (count) => {
        const box = control("keep_best", "input[type=number]");
        await box.fill(count);
        await box.blur();
    };
    const give = (name, ...files) => control(name, "input[type=file]").setInputFiles(files.map((file) => `${root}/docs/${file}`));
    seen.shown = {atFirst: await shown(), nudged: await tick("nudge", true), scored: null};
    await tick("nudge", false);
    seen.shown.scored = await tick("score", true);
    await keep("2");
    seen.shown.kept = await tick("score", false);
    await give("subject_references", "panel.png", "sheet-webui.png");
    await give("style_references", "panel.png");
    seen.given = await until(read, (now) => now.subject_references.length === 2 && now.style_references.length === 1);
    await keep("0");
    seen.shown.atLast = await until(shown, (now) => !now.compared);

    await text("#txt2img_paste").click();
    seen.pasted = {prompt: await until(() => value("txt2img_prompt"), (now) => now.startsWith("pasted"))};
    seen.pasted.chips = await until(words, (now) => now[0]?.includes("ink"));
    seen.pasted.shown = await until(shown, (now) => now.nudged);
    seen.pasted.values = await read();
    await text("#txt2img_paste_without_us").click();
    seen.afterwards = await until(read, (now) => !now.enabled && !now.nudge);
    await text("#txt2img_paste").click();
    await until(() => rule.inputValue(), (now) => now === "kl-soft");
    const parameters = control("parameters", ":is(input, textarea)");
    await choose("kl", "Each layer");
    seen.parametersOfAnotherRule = await until(() => parameters.inputValue(), (now) => !now);

    for (const theme of ["light", "dark"]) {
        await page.goto(`${url}?__theme=${theme}`, {waitUntil: "domcontentloaded"});
        await load();
        await area("txt2img_prompt").fill("fox <lora:my_fox:1:role=subject> <lora:ink:0.9:role=style> <lora:detail:0.6>");
        await area("hires_prompt").fill("fox <lora:my_fox:1:role=sbject>");
        await until(words, (now) => now.length === 4);
        await area("txt2img_neg_prompt").fill("blurry <lora:detail:1>");
        await lines(4);
        await page.screenshot({path: `${pictures}/${theme}.png`});
        await tick("nudge", true);
        await give("subject_references", "panel.png", "sheet-webui.png");
        await page.locator("#txt2img_subject_references", {hasText: "sheet-webui"}).waitFor();
        await page.locator(".dynfuse-guidance").first().screenshot({path: `${pictures}/${theme}-guidance.png`});
        for (const name of ["finer_nudges", "terms"]) await text(`#txt2img_${name} .label-wrap`).click();
        await text("#txt2img_clip").waitFor();
        await page.screenshot({path: `${pictures}/${theme}-nudges.png`, fullPage: true});
    }
    return seen;
}

drive(url, look);
