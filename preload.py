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
