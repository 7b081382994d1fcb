"""``python -m gpushim COMMAND``: all Python processes below have the devices."""

import os
import subprocess
import sys

import pytest

from gpushim.checks import Device

CHILD = """
import subprocess, sys
assert "torch" not in sys.modules and "gpushim" not in sys.modules
if sys.argv[1:] == ["child"]:
    subprocess.run([sys.executable, __file__, "grandchild"], check=True)
else:
    import torch, gpushim
    assert "cutlass" not in sys.modules
    x = torch.ones(3, device="cuda:1")
    print(torch.cuda.device_count(), torch.cuda.get_device_capability(1), x.device, other)
    gpushim.driver().problems.append("something is wrong")
"""


def run(folder, *command, path=()):
    variables = {"PYTHONPATH": os.pathsep.join([*path, *sys.path])}
    given = ["--devices", "sm_90a,sm_120a:188", "--folder", str(folder), "--", *command]
    return subprocess.run(
        [sys.executable, "-m", "gpushim", *given], env=os.environ | variables, capture_output=True, text=True
    )


def test_a_grandchild_has_the_devices_and_its_problems_are_told(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.other = 'and its own start'")
    done = run(tmp_path / "gpushim", sys.executable, str(tmp_path / "child.py"), "child", path=[str(tmp_path)])
    assert done.stdout == "2 (12, 0) cuda:1 and its own start\n", done.stderr
    assert done.returncode == 1 and "grandchild\n  something is wrong" in done.stderr


def test_the_code_is_that_of_the_command(tmp_path):
    assert run(tmp_path, "sh", "-c", "exit 7").returncode == 7
    assert run(tmp_path).returncode == 2


def test_devices_by_name():
    assert Device.parse("sm_100a") == ("sm_100a", 148) and Device.parse("sm_90a:114") == ("sm_90a", 114)
    for text in ("sm_120a", "sm_90a:", "sm_90a:x", "90", ""):
        with pytest.raises(ValueError, match="devices"):
            Device.parse(text)
