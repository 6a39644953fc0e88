"""What README.md tells people to type works: every shell block with curl runs against the served model."""
import re
import subprocess

import pytest
from conftest import ROOT

README = ROOT / "README.md"
FENCE = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    text = README.read_text() if README.is_file() else ""
    return [block for block in FENCE.findall(text) if "curl" in block]


def test_there_are_examples():
    assert blocks(), f"{README} shows no curl command"


@pytest.mark.parametrize("block", blocks(), ids=lambda block: re.sub(r"\s+", " ", block)[:60])
def test_an_example_runs(server, block):
    script = re.sub(r"(?:localhost|127\.0\.0\.1):8000", f"127.0.0.1:{server.port}", block)
    script = re.sub(r"^\$ ", "", script, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and '{"error":{"message"' not in done.stdout, done.stdout
