/* Roles by click: the panel lists the prompt's LoRAs as chips, and a click turns one from plain to subject to style,
   by rewriting its tag. The tags are those of lib_dynfuse/roles.py. */

const dynfuse = (() => {
    "use strict";

    const ROLES = ["plain", "subject", "style"];
    const SIGNS = {plain: "○", subject: "●", style: "◆", unknown: "?"};
    const ALLOWED = "subject, style, none";
    const LORA_TAG = /<(?:lora|lyco):([^>]*)>/gi;
    // The host sets a textarea's value without an event (paste, styles, cards), so it is looked at now and then.
    const LOOK_EVERY_MS = 400;
    // A prompt may be megabytes: what is drawn of it, and written about it, is bounded.
    const MOST_CHIPS = 100;
    const MOST_SHOWN = 200;

    const keyOf = (part) => (part.includes("=") ? part.slice(0, part.indexOf("=")).trim().toLowerCase() : "");
    const valueOf = (part) => part.slice(part.indexOf("=") + 1).trim();

    function numberIn(text, otherwise) {
        const value = text === undefined || text.trim() === "" ? NaN : Number(text);
        return Number.isFinite(value) ? value : otherwise;
    }

    /** The LoRA tags of a prompt, in order: where each stands, its name, its strength on the image model, its role. */
    function tags(prompt) {
        // Behind the last ">" every opening would look for another as far as the prompt goes: quadratic.
        const readable = prompt.slice(0, prompt.lastIndexOf(">") + 1);
        return Array.from(readable.matchAll(LORA_TAG), (match) => {
            const parts = match[1].split(":");
            const plain = parts.filter((part) => !keyOf(part));
            const named = (key) => {
                const part = parts.find((one) => keyOf(one) === key);
                return part === undefined ? undefined : valueOf(part);
            };
            const te = numberIn(named("te"), numberIn(plain[1], 1));
            const word = named("role");
            const lower = (word ?? "none").toLowerCase();
            const role = lower === "none" ? "plain" : ROLES.slice(1).includes(lower) ? lower : "unknown";
            return {
                start: match.index,
                end: match.index + match[0].length,
                raw: match[0],
                name: (plain[0] ?? "").trim(),
                unet: numberIn(named("unet"), numberIn(plain[2], te)),
                role,
                word,
            };
        });
    }

    /** The tag as written, with another role; every other part of it is kept as it is. */
    function withRole(raw, role) {
        const parts = raw.slice(1, -1).split(":");
        const first = parts.findIndex((part) => keyOf(part) === "role");
        const kept = parts.filter((part) => keyOf(part) !== "role");
        if (role !== "plain") {
            kept.splice(first < 0 ? kept.length : first, 0, `role=${role}`);
        }
        return `<${kept.join(":")}>`;
    }

    /** The role that a click on a chip gives. */
    const nextRole = (role) => ROLES[(ROLES.indexOf(role) + 1) % ROLES.length];

    const strength = (value) => (Number.isInteger(value) ? value.toFixed(1) : String(value));
    const shown = (text) => (text.length > MOST_SHOWN ? `${text.slice(0, MOST_SHOWN - 1)}…` : text);
    const named = (tag) => `${shown(tag.name)} ${strength(tag.unet)}`;
    const listed = (texts) => shown(texts.slice(0, MOST_CHIPS).join(", "));

    /** One line that says what the roles of a prompt are, or what is missing. */
    const status = (prompt) => statusOf(tags(prompt));

    function statusOf(all) {
        const wrong = all.find((tag) => tag.role === "unknown");
        if (wrong) {
            return {level: "wrong", text: `${shown(wrong.raw)}: unknown role "${shown(wrong.word)}"; allowed: ${ALLOWED}`};
        }
        const of = (role) => all.filter((tag) => tag.role === role);
        const subjects = of("subject");
        const styles = of("style");
        if (!subjects.length && !styles.length) {
            const count = ["no LoRA in the prompt: add one for the subject and one for the style",
                "one LoRA, it has no role: click it",
                "two LoRAs, none has a role: click one"][all.length];
            return {level: "missing", text: count ?? `${all.length} LoRAs, none has a role: click one`};
        }
        const said = [];
        said.push(subjects.length ? `subject: ${listed(subjects.map(named))}` : "no LoRA with role=subject");
        said.push(styles.length ? `style: ${listed(styles.map(named))}` : "no LoRA with role=style");
        const others = of("plain");
        if (others.length) {
            said.push(`plain: ${listed(others.map((tag) => tag.name))}`);
        }
        return {level: subjects.length && styles.length ? "complete" : "missing", text: said.join(" · ")};
    }

    /** What a LoRA card of the extra networks writes into the prompt, read from its own click handler. */
    function readCard(onclick, name, multiplier) {
        const text = '"((?:[^"\\\\]|\\\\.)*)"';
        const pattern = new RegExp(`cardClicked\\('(\\w+)', "<(lora|lyco):((?:[^"\\\\]|\\\\.)*):" \\+ (.+?) \\+ ">"(?: \\+ ${text})?`);
        const found = (onclick ?? "").match(pattern);
        if (!found) return null;
        const unquote = (quoted) => quoted.replace(/\\(.)/g, "$1");
        return {
            tab: found[1],
            tag: `<${found[2]}:${unquote(found[3]) || name}:${numberIn(found[4], numberIn(String(multiplier), 1))}>`,
            words: found[5] ? unquote(found[5]) : "",
        };
    }

    const find = (selector) => document.querySelector(selector);

    /** The prompts that a tab's chips stand for; the hires prompt only where it is used. */
    function prompts(tab) {
        const found = [{area: find(`#${tab}_prompt textarea`), hires: false}];
        const hires = tab === "txt2img" ? find("#hires_prompt textarea") : null;
        if (hires && hires.value.trim() && find("#txt2img_hr-visible-checkbox")?.checked !== false) {
            found.push({area: hires, hires: true});
        }
        return found.filter(({area}) => area);
    }

    /** Replace a part of a textarea as if typed, so that its own undo takes it back and gradio notices. */
    function edit(area, start, end, text) {
        area.focus({preventScroll: true});
        const expected = area.value.slice(0, start) + text + area.value.slice(end);
        if (document.activeElement === area) {
            area.setSelectionRange(start, end);
            document.execCommand("insertText", false, text);
        }
        if (area.value !== expected) {
            // A hidden textarea takes no focus, and some browsers no insertText.
            area.value = expected;
            area.dispatchEvent(new Event("input", {bubbles: true}));
        }
    }

    const setRole = (area, tag, role) => edit(area, tag.start, tag.end, withRole(tag.raw, role));

    function element(name, classes, text, attributes = {}) {
        const made = document.createElement(name);
        made.className = classes;
        made.textContent = text;
        for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
        return made;
    }

    /** The chip of the prompt's tag number `index`. */
    function chip(tab, tag, index, hires) {
        const next = nextRole(tag.role);
        const role = tag.role === "unknown" ? shown(tag.word) : tag.role;
        const made = element("button", `dynfuse-chip dynfuse-${tag.role}`, "", {
            type: "button",
            title: `${shown(tag.raw)}\nClick: ${next}`,
            "aria-label": `${hires ? "hires prompt, " : ""}${named(tag)}: ${role}. Press for ${next}.`,
        });
        made.append(element("span", "dynfuse-sign", SIGNS[tag.role], {"aria-hidden": "true"}), ` ${named(tag)} `);
        made.append(element("span", "dynfuse-role", role));
        if (hires) made.append(" ", element("span", "dynfuse-hires", "hires"));
        made.addEventListener("click", (event) => {
            const place = [...made.parentElement.children].indexOf(made);
            // Read anew: the words around the tag may have changed since this chip was drawn.
            const area = prompts(tab).find((one) => one.hires === hires)?.area;
            const written = area && tags(area.value)[index];
            if (written?.raw === tag.raw) setRole(area, written, next);
            draw(tab);
            // A mouse click leaves the caret in the prompt, where undo is; a key press stays on the chip.
            if (event.detail === 0) find(`#dynfuse_roles_${tab} .dynfuse-chips`)?.children[place]?.focus();
        });
        return made;
    }

    // What each tab's line was drawn from: the prompts' texts, and their tags.
    const drawnFrom = new WeakMap();
    const isSame = (one, other) => one.length === other.length && one.every((text, index) => text === other[index]);

    /** Fill a tab's line of chips and its status line, where the tags changed since. */
    function draw(tab) {
        const place = find(`#dynfuse_roles_${tab}`);
        if (!place) return;
        const fields = prompts(tab).map(({area, hires}) => ({hires, text: area.value}));
        const texts = fields.map(({hires, text}) => `${hires} ${text}`);
        let root = place.querySelector(".dynfuse-roles");
        const before = root && drawnFrom.get(root);
        if (before && isSame(before.texts, texts)) return;
        const read = fields.map(({hires, text}) => ({hires, all: tags(text)}));
        const written = read.flatMap(({hires, all}) => [String(hires), ...all.map((tag) => tag.raw)]);
        if (!root) {
            root = element("div", "dynfuse-roles", "");
            root.append(element("div", "dynfuse-chips", "", {role: "group", "aria-label": "Roles of the prompt's LoRAs"}));
            root.append(element("div", "dynfuse-status", "", {role: "status"}));
            place.append(root);
        }
        drawnFrom.set(root, {texts, written});
        if (before && isSame(before.written, written)) return;
        root.firstChild.replaceChildren(...read.flatMap(({hires, all}) => {
            const chips = all.slice(0, MOST_CHIPS).map((tag, index) => chip(tab, tag, index, hires));
            const more = all.length - chips.length;
            return more ? [...chips, element("span", "dynfuse-more", `and ${more} more`)] : chips;
        }));
        root.lastChild.replaceChildren(...read.map(({hires, all}) => {
            const {level, text} = statusOf(all);
            return element("div", `dynfuse-${level}`, `${hires ? "hires: " : ""}${text}`);
        }));
    }

    /** Hide what does nothing now: references while nothing is compared with them, a nudge's own while there are none.
        The inputs are looked at, as a paste or the host's saved defaults set them without an event. */
    function hideIdle() {
        for (const root of document.querySelectorAll(".dynfuse-guidance")) {
            const ticked = (name) => Boolean(root.querySelector(`.dynfuse-${name} input[type=checkbox]`)?.checked);
            const kept = Number(root.querySelector(".dynfuse-keep_best input[type=number]")?.value) > 0;
            root.classList.toggle("dynfuse-unnudged", !ticked("nudge"));
            root.classList.toggle("dynfuse-uncompared", !ticked("nudge") && !ticked("score") && !kept);
        }
    }

    function drawAll() {
        if (document.hidden) return;
        draw("txt2img");
        draw("img2img");
        hideIdle();
    }

    /** Write a card's LoRA into its tab's prompt with a role, or give the one that is there that role. */
    function insertCard({tab, tag, words}, role) {
        const area = find(`#${tab}_prompt textarea`);
        if (!area) return;
        const written = tags(area.value).find((one) => one.name === tags(tag)[0].name);
        if (written) {
            setRole(area, written, role);
        } else {
            const between = typeof opts === "undefined" ? " " : opts.extra_networks_add_text_separator ?? " ";
            const text = withRole(tag, role) + (words ? ` ${words.trim()}` : "");
            edit(area, area.value.length, area.value.length, (area.value ? between : "") + text);
        }
        draw(tab);
    }

    /** A LoRA card gets its two buttons when the pointer first comes to it: cards are many and often made anew. */
    function equipCard(event) {
        const card = event.target.closest?.(".card[onclick]");
        const row = card?.querySelector(".button-row");
        if (!row || row.querySelector(".dynfuse-card-button")) return;
        const multiplier = typeof opts === "undefined" ? 1 : opts.extra_networks_default_multiplier;
        const read = readCard(card.getAttribute("onclick"), card.dataset.name, multiplier);
        if (!read) return;
        for (const [letter, role] of [["T", "style"], ["S", "subject"]]) {
            const button = element("div", "card-button dynfuse-card-button", letter, {
                title: `Insert with role=${role}`,
                role: "button",
                tabindex: "0",
            });
            const insert = (pressed) => {
                pressed.stopPropagation();
                pressed.preventDefault();
                insertCard(read, role);
            };
            button.addEventListener("click", insert);
            button.addEventListener("keydown", (pressed) => {
                if (pressed.key === "Enter" || pressed.key === " ") insert(pressed);
            });
            row.prepend(button);
        }
    }

    if (typeof document !== "undefined") {
        document.addEventListener("input", (event) => event.target.matches?.("textarea") && drawAll());
        document.addEventListener("change", hideIdle);
        document.addEventListener("pointerover", equipCard);
        setInterval(drawAll, LOOK_EVERY_MS);
    }

    return {tags, withRole, nextRole, status, readCard};
})();

if (typeof module !== "undefined") {
    module.exports = dynfuse;
}
