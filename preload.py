"""What the extension adds to the WebUI's command line, whose settings only the owner of the server makes."""

from __future__ import annotations

from argparse import ArgumentParser


def preload(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dynfuse-reference-folder",
        action="append",
        default=[],
        metavar="FOLDER",
        help="let the API and X/Y/Z plots name DynFuse's reference pictures below this folder by their paths; "
        "may be repeated",
    )
    parser.add_argument(
        "--dynfuse-encoder",
        action="append",
        default=[],
        metavar="NAME",
        help="let DynFuse use this CLIP or DINO of the model hub too, as ViT-L-14:laion2b_s32b_b82k or "
        "facebook/dinov2-base; may be repeated",
    )
    parser.add_argument(
        "--dynfuse-encoder-folder",
        default=None,
        metavar="FOLDER",
        help="where DynFuse looks for CLIP and DINO instead of models/dynfuse; safetensors files alone are read there",
    )
