/* An X/Y/Z plot over two of our options, as a person would make it: node plot.cjs URL SUBJECT STYLE PICTURES */

const {drive, until} = require("./browser.cjs");

const [url, subject, style, pictures] = process.argv.slice(2);
const MADE_IN_MS = 240000;
const CELLS = 4;

async function look(page) {
    page.setDefaultTimeout(60000);
    const on = (selector) => page.locator(selector).first();
    const plot = (name, inside) => on(`#script_txt2img_xyz_plot_${name} ${inside}`);
    const choose = async (input, words) => {
        await input.click();
        await on(`ul.options li[aria-label="${words}"]`).click();
    };
    const info = () => on("#html_info_txt2img").innerText();

    await on("#script_txt2img_dynfuse_enabled-visible-checkbox").check();
    await on("#txt2img_prompt textarea").fill(`a <lora:${subject}:1:role=subject> <lora:${style}:0.9:role=style>`);
    for (const [name, value] of [["steps", 2], ["width", 64], ["height", 64], ["seed", 7]]) {
        await on(`#txt2img_${name} input[type=number]`).fill(String(value));
        await on(`#txt2img_${name} input[type=number]`).blur();
    }
    await choose(on("#script_list input"), "X/Y/Z plot");
    await choose(plot("x_type", "input"), "[DynFuse] Rule");
    const rules = page.locator("#tab_txt2img .gradio-dropdown", {hasText: "X values"}).locator("input");
    for (const rule of ["kl", "random"]) await choose(rules, rule);
    await page.keyboard.press("Escape");
    await choose(plot("y_type", "input"), "[DynFuse] Subject to style");
    await plot("y_values", ":is(input, textarea)").fill("0, 0.5");
    await plot("include_lone_images", "input").check();
    await page.screenshot({path: `${pictures}/webui-plot-asked.png`, fullPage: true});

    await on("#txt2img_generate").click();
    const thumbnails = page.locator("#txt2img_gallery .thumbnail-item.thumbnail-small");
    await thumbnails.nth(CELLS).waitFor({timeout: MADE_IN_MS});
    await page.screenshot({path: `${pictures}/webui-plot.png`, fullPage: true});
    const seen = {cells: []};
    // From the last: the grid, which is shown first, may have the first cell's text.
    let shown = await until(info, (now) => now.includes("Steps:"));
    for (let cell = CELLS; cell > 0; cell--) {
        await thumbnails.nth(cell).click();
        shown = await until(info, (now) => now !== shown);
        seen.cells.unshift(shown);
    }
    return seen;
}

drive(url, look);
