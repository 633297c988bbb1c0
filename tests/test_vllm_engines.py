"""What starts and ends vLLM's engines, as far as it can be told without vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from prefs.config import VllmConfig
from prefs.errors import UserError
from prefs.models.loading import Models, identity
from prefs.models.vllm.workers import _ctrl_c_gets_through, _guard, _output_to, _reason, _reason_in

LOG = """\
(EngineCore pid=12) WARNING 11-24 10:38:54 [base.py:380] ValueError: only a warning
(Worker pid=13) ERROR 11-24 10:57:12 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=13) ERROR 11-24 10:57:12 [multiproc_executor.py:1063]     raise ValueError("To serve")
(Worker pid=13) ERROR 11-24 10:57:12 [multiproc_executor.py:1063] ValueError: To serve at least one request
(EngineCore pid=12) ERROR 11-24 10:57:12 [core.py:1512] RuntimeError: Worker failed, see the stack trace above
"""


def test_the_reason_is_the_first_error_that_was_logged():
    assert _reason_in(LOG) == "To serve at least one request"
    assert _reason_in(LOG.replace("ValueError: To", "torch.OutOfMemoryError: To")) == (
        "OutOfMemoryError: To serve at least one request"
    )
    assert _reason_in("(EngineCore pid=2) ERROR 11-24 11:11:08 [core.py:1512] RuntimeError: cancelled\n") is None
    assert _reason_in("") is None


def test_the_reason_of_an_error_is_one_line():
    pydantic = ValueError(
        "1 validation error for ModelConfig\n  Value error, no such thing [type=value_error, x=1]\n ?"
    )
    assert _reason(pydantic).startswith("Value error, no such thing")
    assert _reason(ValueError("\n")) == "ValueError"
    assert "\n" not in _reason(ValueError("short\nand more\n\nand more"))


def test_vllm_that_is_not_installed_is_one_line(smollm2_fp32):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(UserError, match=r"pip install 'prefs\[vllm\]'") as caught:
        Models().get(dataclasses.replace(smollm2_fp32, backend="vllm"))
    assert "\n" not in str(caught.value)


def test_engine_arguments_that_change_results_are_part_of_the_model(smollm2_fp32):
    def known(**arguments):
        return identity(dataclasses.replace(smollm2_fp32, backend="vllm", vllm=VllmConfig(engine=arguments)))

    assert known(max_num_seqs=8) == identity(smollm2_fp32)
    assert known(kv_cache_dtype="fp8") != identity(smollm2_fp32)
    assert known(hf_overrides={"rope_theta": 1.0}) != known(hf_overrides={"rope_theta": 2.0})


def test_output_of_child_processes_goes_to_the_log(tmp_path, capfd):
    with _output_to(tmp_path / "log"):
        os.write(1, b"from here\n")
        child = subprocess.Popen([sys.executable, "-c", "input(); print('later', flush=True)"], stdin=subprocess.PIPE)
    os.write(1, b"on the terminal\n")
    child.communicate(b"\n")
    assert (tmp_path / "log").read_text() == "from here\nlater\n"
    assert capfd.readouterr().out == "on the terminal\n"


@pytest.mark.parametrize("closed", [True, False])
def test_engines_outlive_their_guard_only_if_it_is_told(closed):
    engine = subprocess.Popen(["sleep", "60"])
    guard = _guard([engine.pid])
    guard.communicate(b"closed\n" if closed else b"")
    time.sleep(0.1)
    assert (engine.poll() is None) is closed
    engine.kill()
    assert engine.wait() == -signal.SIGKILL


def test_ctrl_c_comes_through_what_swallows_it():
    def start():
        try:
            time.sleep(10)
        except KeyboardInterrupt:
            pytest.fail("swallowed")

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), _ctrl_c_gets_through():
        start()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
