"""A real headless Chromium for tests of pages.

    python tests/browser.py     install one where that is possible, and say which one the tests will use

Playwright's synchronous interface keeps an event loop in its thread: close it (leave the `with`) before
anything else in the process runs one, nbval among it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Error, Playwright, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "there is no Chromium: install one (Debian: apt-get install chromium-headless-shell; anywhere: "
    "python -m playwright install chromium), or name one in CHROMIUM"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser: that of CHROMIUM, else the system's, else one that Playwright installed.

    Raises:
        pytest's Skipped: there is none.
        playwright.sync_api.Error: there is one, and it does not start.
    """
    with sync_playwright() as playwright:
        path = find(playwright)
        if path is None:
            pytest.skip(MISSING)
        browser = playwright.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            browser.close()


def find(playwright: Playwright) -> str | None:
    """Path of the browser that the tests use."""
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
    if named and not shutil.which(named):
        raise FileNotFoundError(f"CHROMIUM is {named!r}, which is no program; name one or leave it out")
    return found if shutil.which(found) else None


def install() -> None:
    """Install Debian's, as root where apt-get is."""
    if os.geteuid() or not shutil.which("apt-get"):
        return
    apt = ["apt-get", "-qq", "-o", "Acquire::Retries=3"]
    print("installing Chromium for the tests", flush=True)
    with_apt = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", NAMES[0]]):
        subprocess.run([*apt, *arguments], env=with_apt, stdout=subprocess.DEVNULL)


def main() -> None:
    with sync_playwright() as playwright:
        if find(playwright) is None:
            install()
        found = find(playwright)
        if found is None:
            print(f"browser tests will be skipped: {MISSING}", file=sys.stderr)
            return
        try:
            browser = playwright.chromium.launch(executable_path=found)
        except Error as error:
            sys.exit(f"{found} does not start: {error}")
        print(f"browser tests run in {found}, version {browser.version}")
        browser.close()


if __name__ == "__main__":
    main()
