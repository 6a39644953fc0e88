"""The `openai` npm client: see npm/openai.mjs."""
import shutil
import subprocess

import pytest
from conftest import ROOT

FOLDER = ROOT / "tests/clients/npm"


@pytest.fixture(scope="module")
def installed():
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.fail("node and npm are needed")
    subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=FOLDER, check=True, timeout=300)


def test_the_npm_client(installed, server):
    done = subprocess.run(["node", "openai.mjs", server.url], cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 8
