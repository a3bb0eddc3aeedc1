"""tests/faults.py at small size: a few faults of each kind, none of which may leave a trace."""
import json
import subprocess
import sys

from conftest import ROOT


def test_faults_end_in_order_and_the_same_command_goes_on():
    done = subprocess.run([sys.executable, ROOT / "tests" / "faults.py"], capture_output=True,
                          text=True)
    kinds = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(kinds) >= 8, done.stderr[-3000:]
    assert all(kind["tries"] > 0 for kind in kinds)
