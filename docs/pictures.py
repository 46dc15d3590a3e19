"""Make the pictures of the README from what rayexp wrote, with headless Chromium.

    rayexp verify configs/quickstart.yaml --workers 0,1,2,4 --kill > verify.txt 2>&1
    python docs/pictures.py --diff runs/RUN/diff.html --compare runs/COMPARE/report.html --verify verify.txt

Writes docs/diff.png, docs/compare.png and docs/verify.png, each at most 200 kB.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console

LIMIT = 200_000  # bytes
WIDTH = 1160  # pixels
VERIFY = "rayexp verify configs/quickstart.yaml --workers 0,1,2,4 --kill"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def picture(page: Path, out: Path, width: int, height: int) -> None:
    """A screenshot of the top of a page, with as many colours as fit into the limit."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [chromium, *FLAGS, f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        subprocess.run(
            [*command, f"--window-size={width},{height}", page.resolve().as_uri()], check=True, capture_output=True
        )
        image = Image.open(shot).convert("RGB")
        for colours in (256, 128, 64, 32):
            image.quantize(colours).save(out, optimize=True)
            if out.stat().st_size <= LIMIT:
                break
    print(f"{out}: {out.stat().st_size} bytes")


def terminal(output: Path, command: str) -> Console:
    """What a command printed, as a terminal shows it below its prompt."""
    lines = output.read_text(encoding="utf-8").rstrip().splitlines()
    console = Console(record=True, width=max(map(len, [command, *lines])) + 2, file=io.StringIO())
    for line in [f"$ {command}", *lines]:
        console.print(line, markup=False, highlight=False)
    return console


def main() -> None:
    """Parse and make what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diff", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--verify", type=Path, help="the output of VERIFY in a file")
    args = parser.parse_args()
    here = Path(__file__).parent
    if args.diff:
        picture(args.diff, here / "diff.png", 1100, 700)
    if args.compare:
        picture(args.compare, here / "compare.png", 1160, 655)
    if args.verify:
        console = terminal(args.verify, VERIFY)
        drawing = console.export_svg(title="rayexp verify", clear=False)
        left, top, width, height = map(float, re.findall(r'viewBox="([\d. ]+)"', drawing)[0].split())
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "verify.html"
            page.write_text(f"<style>body{{margin:0}}</style>{drawing}", encoding="utf-8")
            scale = WIDTH / (width - left)
            picture(page, here / "verify.png", WIDTH, round((height - top) * scale))


if __name__ == "__main__":
    main()
