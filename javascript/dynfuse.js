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
    // A LoRA may have come into the host's list since it was asked for.
    const ASK_AGAIN_MS = 5000;
    const UNTICKED = "roles do nothing yet: tick Dynamic LoRA Fusion";
    const NUMBER = /^[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i;

    const keyOf = (part) => (part.includes("=") ? part.slice(0, part.indexOf("=")).trim().toLowerCase() : "");
    const valueOf = (part) => part.slice(part.indexOf("=") + 1).trim();

    function numberIn(text, otherwise) {
        const value = text === undefined || text.trim() === "" ? NaN : Number(text);
        return Number.isFinite(value) ? value : otherwise;
    }

    /** Of a tag's numbers the first that the host cannot read, which then leaves out all LoRAs: [what it is, its text]. */
    function unreadable(plain, named) {
        const numbers = [["strength", plain[1]], ["te", named("te")], ["unet", plain[2]], ["unet", named("unet")],
            ["dyn", plain[3]], ["dyn", named("dyn")]];
        // Another extension reads schedules such as 0@0,1@0.5 and hides them from the host.
        return numbers.find(([, text]) => text !== undefined && !text.includes("@") && !NUMBER.test(text.trim()));
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
                unreadable: unreadable(plain, named),
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
    const written = (tag) => (tag.unreadable ? shown(tag.unreadable[1].trim()) : strength(tag.unet));
    const named = (tag) => `${shown(tag.name)} ${written(tag)}`;
    const listed = (texts) => shown(texts.slice(0, MOST_CHIPS).join(", "));

    /** What is wrong with the tags of a prompt, empty where nothing is. `unlisted`: names that the host does not know. */
    function faultOf(all, unlisted) {
        const numbered = all.find((tag) => tag.unreadable);
        if (numbered) {
            const [what, text] = numbered.unreadable;
            return `${shown(numbered.raw)}: ${what} "${shown(text.trim())}" is not a number; write for example 0.8 `
                + "(the WebUI leaves out all LoRAs otherwise)";
        }
        const wrong = all.find((tag) => tag.role === "unknown");
        if (wrong) return `${shown(wrong.raw)}: unknown role "${shown(wrong.word)}"; allowed: ${ALLOWED}`;
        const gone = new Set(all.map((tag) => tag.name).filter((name) => unlisted.has(name)));
        if (gone.size) return `not in the WebUI's list: ${listed([...gone])} (refresh the list if the file is new)`;
        const roles = new Map();
        for (const {name, role} of all) {
            const other = roles.get(name) ?? role;
            if (other !== role) {
                return other === "plain" || role === "plain"
                    ? `${shown(name)} is there with a role and without one: write one tag for it`
                    : `${shown(name)} is subject and style at once: a LoRA can have one role only`;
            }
            roles.set(name, role);
        }
        return "";
    }

    /** One line that says what the roles of a prompt are, or what is missing. */
    const status = (prompt, unlisted = []) => statusOf(tags(prompt), new Set(unlisted));

    function statusOf(all, unlisted) {
        const fault = faultOf(all, unlisted);
        if (fault) return {level: "wrong", text: fault};
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

    const givesRoles = (fields) => fields.some(({all}) => all.some((tag) => tag.role !== "plain"));

    /** The lines under the chips: what each prompt's roles are, and what keeps any from being used.
        fields: of each prompt its tags, `all`, and whether it is the hires one; negative: the negative prompts' tags;
        ticked: null where that is not known. */
    function lines(fields, {ticked, unlisted, negative}) {
        const said = fields.map(({hires, all}) => {
            const {level, text} = statusOf(all, unlisted);
            return {level, text: `${hires ? "hires: " : ""}${text}`};
        });
        if (negative.length) {
            const raws = listed(negative.map((tag) => tag.raw));
            said.push({level: "wrong", text: `negative prompt: ${raws} does nothing there; write it into the prompt`});
        }
        if (ticked === false && givesRoles(fields)) said.push({level: "wrong", text: UNTICKED});
        return said;
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

    /** A tab's negative prompts, as `prompts`. */
    function negatives(tab) {
        const hires = prompts(tab).some((one) => one.hires) ? find("#hires_neg_prompt textarea") : null;
        return [find(`#${tab}_neg_prompt textarea`), hires].filter(Boolean);
    }

    /** The host's frame of our panel, whose header has the checkbox that ticks it; null on a page that is no WebUI. */
    const frame = (tab) => find(`#dynfuse_roles_${tab}`)?.closest(".input-accordion") ?? null;

    const checkbox = (tab) => frame(tab)?.visibleCheckbox ?? find(`.dynfuse-enabled-${tab} input[type=checkbox]`);

    /** Tick the panel, as the person has given a role. */
    function tick(tab) {
        const box = checkbox(tab);
        if (!box || box.checked) return;
        if (frame(tab)?.onVisibleCheckboxChange) {
            // The host's own way, which unfolds the panel too.
            box.checked = true;
            frame(tab).onVisibleCheckboxChange();
        } else {
            box.click();
        }
    }

    /** A few words in the panel's header, which is all that is seen of it while it is folded. */
    function markHeader(tab, text) {
        const header = frame(tab)?.querySelector(".label-wrap");
        if (!header) return;
        let mark = header.querySelector(".dynfuse-unticked");
        if (!mark && text) {
            mark = element("span", "dynfuse-unticked", "");
            header.insertBefore(mark, header.lastElementChild);
        }
        if (mark && mark.textContent !== text) mark.textContent = text;
    }

    // Of each tab: the names that the host was asked for, when, and how often.
    const asked = {};

    /** Those of the names that the host does not know, as far as it has answered; asks it for those that are new. */
    function unlisted(tab, names) {
        const question = find(`.dynfuse-asks-${tab} textarea`);
        const answer = find(`.dynfuse-answers-${tab} textarea`);
        if (!question || !answer) return new Set();
        const found = new Set();
        try {
            for (const name of JSON.parse(answer.value || "{}").unlisted ?? []) found.add(name);
        } catch {
            // Half written: it is looked at again.
        }
        const last = asked[tab] ?? {names: "[]", at: 0, turn: 0};
        const wanted = JSON.stringify(names);
        const again = names.some((name) => found.has(name)) && Date.now() - last.at > ASK_AGAIN_MS;
        if (wanted !== last.names || again) {
            asked[tab] = {names: wanted, at: Date.now(), turn: last.turn + 1};
            // The turn makes the same question another text, without which nobody would be asked.
            question.value = JSON.stringify({turn: last.turn + 1, names});
            question.dispatchEvent(new Event("input", {bubbles: true}));
        }
        return found;
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
    function chip(tab, tag, index, hires, isUnlisted) {
        const next = nextRole(tag.role);
        const role = tag.role === "unknown" ? shown(tag.word) : tag.role;
        const wrong = isUnlisted || tag.unreadable ? " dynfuse-doubtful" : "";
        const made = element("button", `dynfuse-chip dynfuse-${tag.role}${wrong}`, "", {
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

    // What each tab's line was drawn from: the texts of its prompts and what else it depends on, its tags, its lines.
    const drawnFrom = new WeakMap();
    const isSame = (one, other) => one.length === other.length && one.every((text, index) => text === other[index]);

    function makeRoot(place) {
        const root = element("div", "dynfuse-roles", "");
        root.append(element("div", "dynfuse-chips", "", {role: "group", "aria-label": "Roles of the prompt's LoRAs"}));
        root.append(element("div", "dynfuse-status", "", {role: "status"}));
        place.append(root);
        drawnFrom.set(root, {texts: [], tags: [], lines: []});
        return root;
    }

    /** Fill a tab's line of chips and its status lines, where something changed since. */
    function draw(tab) {
        const place = find(`#dynfuse_roles_${tab}`);
        if (!place) return;
        const root = place.querySelector(".dynfuse-roles") ?? makeRoot(place);
        const before = drawnFrom.get(root);
        const areas = prompts(tab);
        const below = negatives(tab).map((area) => area.value);
        const ticked = checkbox(tab)?.checked ?? null;
        const answer = find(`.dynfuse-answers-${tab} textarea`)?.value ?? "";
        const texts = [...areas.map(({area, hires}) => `${hires} ${area.value}`), "", ...below, String(ticked), answer];
        const due = Date.now() - (asked[tab]?.at ?? 0) > ASK_AGAIN_MS && before.doubtful;
        if (isSame(before.texts, texts) && !due) return;

        const fields = areas.map(({area, hires}) => ({hires, all: tags(area.value)}));
        const names = [...new Set(fields.flatMap(({all}) => all.slice(0, MOST_CHIPS).map((tag) => tag.name)))];
        const gone = unlisted(tab, names);
        const raws = fields.flatMap(({hires, all}) => [String(hires), ...all.map((tag) => `${gone.has(tag.name)} ${tag.raw}`)]);
        const said = lines(fields, {ticked, unlisted: gone, negative: below.flatMap(tags)});
        const texted = said.map(({level, text}) => `${level} ${text}`);
        if (!isSame(before.tags, raws)) {
            root.firstChild.replaceChildren(...fields.flatMap(({hires, all}) => {
                const chips = all.slice(0, MOST_CHIPS).map((tag, index) => chip(tab, tag, index, hires, gone.has(tag.name)));
                const more = all.length - chips.length;
                return more ? [...chips, element("span", "dynfuse-more", `and ${more} more`)] : chips;
            }));
        }
        if (!isSame(before.lines, texted)) {
            root.lastChild.replaceChildren(...said.map(({level, text}) => element("div", `dynfuse-${level}`, text)));
        }
        markHeader(tab, ticked === false && givesRoles(fields) ? "the prompt gives roles: tick to use them" : "");
        const doubtful = names.some((name) => gone.has(name));
        drawnFrom.set(root, {texts, tags: raws, lines: texted, doubtful});
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
        tick(tab);
        draw(tab);
    }

    function cardOf(target) {
        const card = target.closest?.(".card[onclick]");
        const multiplier = typeof opts === "undefined" ? 1 : opts.extra_networks_default_multiplier;
        const read = card && readCard(card.getAttribute("onclick"), card.dataset.name, multiplier);
        return read ? {card, read} : null;
    }

    /** A click on a card whose LoRA is in the prompt takes it out again. The host knows it only by a tag without a role
        and would add a second one, so the tag is made one ahead of the host's own handler. */
    function cardClicked(event) {
        if (event.target.closest?.(".button-row")) return;
        const clicked = cardOf(event.target);
        const area = clicked && find(`#${clicked.read.tab}_prompt textarea`);
        if (!area) return;
        const [plain] = tags(clicked.read.tag);
        for (const tag of tags(area.value).reverse()) {
            if (tag.name === plain.name && tag.word !== undefined) edit(area, tag.start, tag.end, plain.raw);
        }
    }

    /** A LoRA card gets its two buttons when the pointer first comes to it: cards are many and often made anew. */
    function equipCard(event) {
        const row = event.target.closest?.(".card[onclick]")?.querySelector(".button-row");
        if (!row || row.querySelector(".dynfuse-card-button")) return;
        const found = cardOf(event.target);
        if (!found) return;
        for (const [letter, role] of [["T", "style"], ["S", "subject"]]) {
            const button = element("div", "card-button dynfuse-card-button", letter, {
                title: `Insert with role=${role}`,
                role: "button",
                tabindex: "0",
            });
            const insert = (pressed) => {
                pressed.stopPropagation();
                pressed.preventDefault();
                insertCard(found.read, role);
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
        document.addEventListener("click", cardClicked, true);
        setInterval(drawAll, LOOK_EVERY_MS);
    }

    return {tags, withRole, nextRole, status, lines, readCard};
})();

if (typeof module !== "undefined") {
    module.exports = dynfuse;
}
