"""`eckart serve` answers as greedy `generate` does. Oracle: transformers' generate, in this process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch

from eckart.checkpoint import load, save
from eckart.dataflow import low_rank_layers
from eckart.errors import EckartError, ModelError
from eckart.factoring import factor_
from eckart.matrices import find_matrices
from eckart.server import serve
from eckart.surgery import make_edit

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def need_server():
    """Skip where an extra is missing."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra 'serve'")


@pytest.fixture(scope="module")
def folder(tiny_llama_folder, tmp_path_factory):
    """A factored model with a chat template."""
    model, tokenizer = load(str(tiny_llama_folder))
    factor_(model, [make_edit(m, 0.2) for m in find_matrices(model) if m.type == "fc_in"])
    tokenizer.chat_template = TEMPLATE
    return save(model, tmp_path_factory.mktemp("served") / "model", tokenizer)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(address, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextmanager
def server(folder, tmp_path):
    """Run the program until it answers; kill it in any case after two minutes."""
    port = free_port()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "eckart.cli", "serve", str(folder), "--port", str(port)]
    with (tmp_path / "log").open("w+") as log:
        # A suite that a shell runs in the background has been told to ignore Ctrl-C, and so would be the server.
        heard = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        finally:
            signal.signal(signal.SIGINT, heard)
        killer = threading.Timer(120, process.kill)
        killer.start()
        try:
            address = f"http://127.0.0.1:{port}"
            while True:
                if process.poll() is not None:
                    pytest.fail((tmp_path / "log").read_text())
                try:
                    assert ask(f"{address}/health")["status"] == "ok"
                    break
                except urllib.error.URLError:
                    time.sleep(0.2)
            yield address, process
        finally:
            killer.cancel()
            process.kill()
            process.wait()


def test_completions_and_chats_are_those_of_greedy_generate(folder, tmp_path):
    need_server()
    model, tokenizer = load(str(folder))
    assert low_rank_layers(model)
    prompt = "the cat lives in"
    options = {"max_tokens": 5, "temperature": 0}

    def expected(ids):
        words = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(words, skip_special_tokens=True)

    with server(folder, tmp_path) as (address, process):
        text = ask(f"{address}/v1/completions", {"model": str(folder), "prompt": prompt, **options})
        assert text["choices"][0]["text"] == expected(tokenizer(prompt, return_tensors="pt").input_ids)
        assert text["usage"]["completion_tokens"] > 0
        messages = [{"role": "user", "content": prompt}]
        chat = ask(f"{address}/v1/chat/completions", {"model": str(folder), "messages": messages, **options})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert chat["choices"][0]["message"]["content"] == expected(ids)
        # No request brings another model from the network.
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(f"{address}/v1/completions", {"model": "some/other", "prompt": prompt, **options})
        with refused.value as answer:
            assert answer.code == 400
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert address in log


def test_a_taken_port_is_refused_before_the_model_is_loaded(folder):
    need_server()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EckartError, match="--port"):
            serve(str(folder), port=taken.getsockname()[1])


@pytest.mark.parametrize(("options", "words"), [({"dtype": "int3"}, "--dtype"), ({"device": "toaster"}, "--device")])
def test_what_cannot_be_served_is_told_at_once(options, words, folder):
    need_server()
    with pytest.raises(ModelError, match=words):
        serve(str(folder), **options)


def test_a_model_without_a_tokenizer_is_not_served(folder, tmp_path):
    need_server()
    save(load(str(folder))[0], tmp_path / "a")
    with pytest.raises(ModelError, match="tokenizer"):
        serve(str(tmp_path / "a"), port=free_port())


def test_a_missing_package_is_named_with_what_to_install(monkeypatch, folder):
    monkeypatch.setattr("eckart.server.is_serve_available", lambda: False)
    with pytest.raises(EckartError, match=r"pip install 'eckart\[serve\]'"):
        serve(str(folder))


@pytest.mark.parametrize(("stored", "asked", "used"), [("bfloat16", "auto", "float32"), ("bfloat16", "stored", "auto")])
def test_half_precision_is_widened_on_a_cpu_unless_asked_otherwise(stored, asked, used, folder, tmp_path, monkeypatch):
    need_server()
    model, tokenizer = load(str(folder))
    save(model.to(getattr(torch, stored)), tmp_path / "a", tokenizer)
    seen = {}
    monkeypatch.setattr("transformers.cli.serve.Serve", lambda name, **options: seen.update(options, name=name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    serve(str(tmp_path / "a"), port=free_port(), device="cpu", dtype=asked)
    assert seen["dtype"] == used
    assert seen["device"] == "cpu"
    assert seen["host"] == "127.0.0.1"
