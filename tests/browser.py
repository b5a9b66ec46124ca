"""Opens a page in Chromium, without a window, to see whether a script runs in it."""

import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000")
RUN = "document.documentElement.dataset.ran=1"
# Ways out of a text, an attribute, a title, a style and a comment, with a mark where a script runs.
HOSTILE = (
    f"<script>{RUN}</script>"
    f"\"'><img src=x onerror={RUN}>"
    f"<svg onload={RUN}>"
    f"</title></style></textarea>--><script>{RUN}</script>"
    f"' onload='{RUN}' onerror='{RUN}' x='"
    f"{{{{ ''.__class__ }}}}{{% raw %}}]]><script>{RUN}</script>"
)


def scripts_run(text, folder):
    """Whether one of :data:`HOSTILE`'s scripts runs in the page; skips without a browser."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    (folder / "page.html").write_text(text, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, *OPTIONS, profile, "--dump-dom", (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "</html>" not in done.stdout:
        pytest.skip(f"{browser} does not run here: {done.stderr.strip()[-300:]}")
    return bool(re.search("<html[^>]* data-ran=", done.stdout))
