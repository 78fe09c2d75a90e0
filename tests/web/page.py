"""The panel on a page of its own, beside what it finds in a WebUI: prompts, a LoRA card, a paste button.

    python tests/web/page.py PORT

It runs in an environment with the gradio of one host or the other and without the host's `modules`.
"""

from __future__ import annotations

import html
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gradio as gr

from lib_dynfuse.webui.arguments import ORDER, PICTURES, pictures
from lib_dynfuse.webui.panel import build

# The host's list of LoRAs: names and aliases.
_LISTED = dict.fromkeys(("my_fox", "ink", "detail", "crisp", "other", "fox"), object())
sys.modules["networks"] = SimpleNamespace(  # type: ignore[assignment]
    available_networks=_LISTED, available_network_aliases=_LISTED, forbidden_network_aliases={}
)

PASTED_PROMPT = "pasted <lora:ink:0.9:role=style>"
PASTED_WITHOUT_US = {"Steps": "20", "Sampler": "Euler a"}
PASTED = {
    "DynFuse": "0.1.0",
    "DynFuse strategy": "kl-soft",
    "DynFuse parameters": '{"softness": 0.5}',
    "DynFuse nudge": "True",
    "DynFuse nudge mode": "adam",
    "DynFuse nudge start": "0.8",
    "DynFuse nudge stop": "0.9",
    "DynFuse clip": "ViT-B-32:mine.safetensors",
    "DynFuse subject references": "1 picture 0123456789",
}
# As the WebUI writes a LoRA's card.
CLICKED = """window.cardOpened = true; cardClicked('txt2img', "<lora:my_fox:" + 0.7 + ">" + " a fox", "", false)"""
CARD = f"""
<div class="extra-network-pane">
<div class="card" data-name="my fox file" onclick="{html.escape(CLICKED)}">
<div class="button-row"></div><span class="name">my fox file</span>
</div></div>
"""


def tab(name: str) -> None:
    """One tab's prompt and panel. `read` writes the panel's values, as the script receives them, into `values`."""
    prompt = gr.Textbox("", lines=3, label="Prompt", elem_id=f"{name}_prompt")
    gr.Textbox("", lines=2, label="Negative prompt", elem_id=f"{name}_neg_prompt")
    if name == "txt2img":
        gr.HTML(CARD)
        gr.Textbox("", lines=3, label="Hires prompt", elem_id="hires_prompt")
    panel = build(name == "img2img", lambda each: f"{name}_{each}")
    values = gr.Textbox("", label="Values", interactive=True, elem_id=f"{name}_values")
    prompt_values = gr.Textbox("", label="Prompt in Python", elem_id=f"{name}_prompt_in_python")

    def read(prompt_text: str, *given: Any) -> tuple[str, str]:
        named = dict(zip(ORDER, given, strict=True))
        return json.dumps({**named, **{name: pictures(named[name]) for name in PICTURES}}), prompt_text

    gr.Button("Read", elem_id=f"{name}_read").click(
        read, inputs=[prompt, *panel.components], outputs=[values, prompt_values]
    )

    def paste(params: dict[str, str]) -> list[Any]:
        # As in the WebUI None leaves a component as it is.
        values = (value(params) for _, value in panel.infotext_fields)
        return [PASTED_PROMPT, *(gr.update() if value is None else value for value in values)]

    for label, params in (("paste", PASTED), ("paste_without_us", PASTED_WITHOUT_US)):
        gr.Button(label, elem_id=f"{name}_{label}").click(
            partial(paste, params), inputs=[], outputs=[prompt, *(component for component, _ in panel.infotext_fields)]
        )


with gr.Blocks(title="DynFuse") as page:
    for each in ("txt2img", "img2img"):
        tab(each)

page.queue()
page.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), quiet=True)
