/* Use the txt2img tab of a running WebUI as a person would: node webui.cjs URL SUBJECT STYLE PICTURES */

const {drive, until} = require("./browser.cjs");

const [url, subject, style, pictures] = process.argv.slice(2);
const MADE_IN_MS = 240000;

async function look(page) {
    page.setDefaultTimeout(60000);
    const on = (selector) => page.locator(selector).first();
    const prompt = on("#txt2img_prompt textarea");
    const ours = (name, inside) => on(`#script_txt2img_dynfuse_${name} ${inside}`);
    const tick = on("#script_txt2img_dynfuse_enabled-visible-checkbox");
    const chips = page.locator("#dynfuse_roles_txt2img .dynfuse-chip");
    const words = async () => (await chips.allInnerTexts()).map((one) => one.replace(/\s+/g, " ").trim());
    const status = () => page.locator("#dynfuse_roles_txt2img .dynfuse-status > div").allInnerTexts();
    const info = () => on("#html_info_txt2img").innerText();
    const seen = {};
    const load = async () => {
        await prompt.waitFor();
        await tick.waitFor();
        await on("#dynfuse_roles_txt2img .dynfuse-status").waitFor({state: "attached"});
    };

    await load();
    seen.lacking = await page.locator(".dynfuse-lacking").allTextContents();
    await prompt.fill(`a ${subject} <lora:${subject}:1> <lora:${style}:0.9>`);
    // The header both opens and ticks; the box alone would leave it folded.
    await on("#script_txt2img_dynfuse_enabled .label-wrap > span").click({position: {x: 60, y: 8}});
    seen.ticked = await tick.isChecked();
    await chips.first().waitFor();
    await chips.nth(0).click();
    await chips.nth(1).click();
    await chips.nth(1).click();
    seen.prompt = await prompt.inputValue();
    seen.chips = await words();
    seen.status = await status();

    for (const [name, value] of [["steps", 3], ["width", 64], ["height", 64], ["seed", 7]]) {
        await on(`#txt2img_${name} input[type=number]`).fill(String(value));
        await on(`#txt2img_${name} input[type=number]`).blur();
    }
    await ours("balance", "input[type=number]").fill("0.25");
    await ours("balance", "input[type=number]").blur();
    await ours("auto_balance", "input").uncheck();
    await ours("trace", "input").check();
    await page.screenshot({path: `${pictures}/webui-panel.png`, fullPage: true});

    await on("#txt2img_generate").click();
    await page.waitForFunction(() => document.querySelector("#html_info_txt2img")?.innerText.includes("Steps:"), null,
        {timeout: MADE_IN_MS});
    seen.info = await info();
    const thumbnails = page.locator("#txt2img_gallery .thumbnail-item.thumbnail-small");
    seen.pictures = await until(() => thumbnails.count(), (now) => now >= 2);
    await page.screenshot({path: `${pictures}/webui-made.png`, fullPage: true});

    await on("#txt2img_send_to_img2img").click();
    const sent = on("#img2img_prompt textarea");
    const sentBalance = on("#script_img2img_dynfuse_balance input[type=number]");
    seen.sent = {
        prompt: await until(() => sent.inputValue(), (now) => now),
        balance: await until(() => sentBalance.inputValue(), (now) => now === "0.25"),
        enabled: await on("#script_img2img_dynfuse_enabled-visible-checkbox").isChecked(),
        chips: (await page.locator("#dynfuse_roles_img2img .dynfuse-chip").allInnerTexts()).length,
    };

    await page.reload({waitUntil: "domcontentloaded"});
    await load();
    seen.afterReload = await tick.isChecked();
    await prompt.fill(seen.info);
    await on("#txt2img_tools #paste").click();
    seen.pasted = {prompt: await until(() => prompt.inputValue(), (now) => !now.includes("Steps:"))};
    seen.pasted.enabled = await until(() => tick.isChecked(), (now) => now);
    seen.pasted.balance = await until(() => ours("balance", "input[type=number]").inputValue(), (now) => now === "0.25");
    seen.pasted.autoBalance = await ours("auto_balance", "input").isChecked();
    seen.pasted.chips = await until(words, (now) => now.length === 2);

    await prompt.fill(`a <lora:${subject}:1>\nSteps: 3, Size: 64x64, Denoising strength: 0.7, Hires upscale: 2, `
        + `Hires prompt: "b <lora:${style}:1:role=style>"`);
    await on("#txt2img_tools #paste").click();
    seen.hires = {used: await until(words, (now) => now.some((one) => one.endsWith("hires")))};
    await on("#txt2img_hr-visible-checkbox").uncheck();
    seen.hires.unused = await until(words, (now) => now.length === 1);

    await tick.uncheck();
    // Folded, the panel shows its header alone.
    const header = on("#script_txt2img_dynfuse_enabled .label-wrap");
    if ((await header.getAttribute("class")).includes("open")) await header.click({position: {x: 400, y: 8}});
    await tick.uncheck();
    await prompt.fill(`a <lora:${subject}:1:role=subject> <lora:${style}:1:role=style>`);
    seen.unticked = {header: await until(() => header.innerText(), (now) => now.includes("tick to use"))};
    seen.unticked.status = await status();
    await page.screenshot({path: `${pictures}/webui-unticked.png`});
    await on("#txt2img_generate").click();
    await page.waitForFunction(() => document.querySelector("#html_info_txt2img")?.innerText.includes("DynFuse note"), null,
        {timeout: MADE_IN_MS});
    seen.unticked.info = await info();
    seen.unticked.comments = await on("#html_log_txt2img").innerText();
    await page.screenshot({path: `${pictures}/webui-unticked-made.png`});
    await prompt.fill(`a <lora:${subject}:1,0:role=subject>`);
    seen.unreadable = await until(status, (now) => now[0]?.includes("is not a number"));
    await prompt.fill(`a <lora:${subject}:1:role=subject> <lora:no such:1:role=style>`);
    seen.unlisted = await until(status, (now) => now[0]?.includes("not in the"));

    await prompt.fill("");
    await page.locator("#txt2img_extra_tabs > .tab-nav button", {hasText: /^\s*Lora\s*$/}).click();
    const card = on(`#txt2img_lora_cards .card[data-name="${subject}"]`);
    await card.hover();
    await card.locator(".dynfuse-card-button", {hasText: "S"}).click();
    seen.card = await prompt.inputValue();
    seen.cardTicks = await until(() => tick.isChecked(), (now) => now);
    await page.screenshot({path: `${pictures}/webui-card.png`});
    const plainClick = async () => {
        await card.locator(".name").click();
        return prompt.inputValue();
    };
    seen.plainClicks = [await plainClick(), await plainClick(), await plainClick()];

    await page.locator("#tabs > .tab-nav button", {hasText: /^\s*Settings\s*$/}).click();
    await page.locator("#settings > .tab-nav button", {hasText: "Dynamic LoRA Fusion"}).click();
    const settings = page.locator("[id^=setting_dynfuse_]");
    await settings.first().waitFor();
    await settings.first().scrollIntoViewIfNeeded();
    seen.settings = await settings.evaluateAll((all) => all.map((one) => one.querySelector("span").innerText.trim()));
    await page.screenshot({path: `${pictures}/webui-settings.png`});

    await page.goto(`${url}/?__theme=dark`, {waitUntil: "domcontentloaded"});
    await load();
    await prompt.fill(`a <lora:${subject}:1:role=subject> <lora:${style}:0.9:role=style> <lora:other:1:role=sbject>`);
    await on("#script_txt2img_dynfuse_enabled .label-wrap > span").click({position: {x: 60, y: 8}});
    await on("#script_txt2img_dynfuse_finer .label-wrap").click();
    await ours("schedule", "input[type=number]").waitFor();
    seen.dark = await page.evaluate(() => document.body.classList.contains("dark"));
    await page.screenshot({path: `${pictures}/webui-dark.png`, fullPage: true});
    return seen;
}

drive(url, look);
