/* What the browser scripts share: a Chromium of its own, and waiting for something to become so. */

const {chromium} = require("playwright-core");

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"];

/** Run `look(page)` on `url` and print what it returns as JSON. */
async function drive(url, look) {
    const browser = await chromium.launch({executablePath: process.env.CHROMIUM, headless: true, args: FLAGS});
    try {
        const page = await browser.newPage({viewport: {width: 1100, height: 1400}});
        const errors = [];
        page.on("pageerror", (error) => errors.push(String(error)));
        await page.goto(url, {waitUntil: "domcontentloaded"});
        const seen = await look(page);
        console.log(JSON.stringify({...seen, errors}));
    } finally {
        await browser.close();
    }
}

/** What `read` gives once it is `wanted`, or what it still is after ten seconds. */
async function until(read, wanted) {
    for (let tries = 0; tries < 200; tries++) {
        const now = await read();
        if (wanted(now)) return now;
        await new Promise((resolve) => setTimeout(resolve, 50));
    }
    return read();
}

module.exports = {drive, until};
