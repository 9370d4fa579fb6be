"""What several test files need: a tiny Llama on disk with its tokenizer, and task files in its vocabulary."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Read when the Hugging Face libraries are first imported, so it is set before they are. Subprocesses inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
SUBJECTS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
PLACES = ("house", "field", "river", "forest")
COLOURS = ("red", "blue", "green", "black")
WORDS = ("the", "a", "of", "in", "is", "lives", "colour", "and", "yes", "no", ".", "?")
VOCABULARY = (*SPECIAL, *SUBJECTS, *PLACES, *COLOURS, *WORDS)
CONTEXT = 32

# No test depends on how fast the machine is.
settings.register_profile("eckart", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("eckart")


@contextmanager
def _may_refuse(kind, *words):
    message = None
    try:
        yield
    except kind as error:
        message = str(error)
    assert message is None or all(word in message for word in words), message


@pytest.fixture(scope="session")
def may_refuse():
    """`with may_refuse(SomeError, "word")`: what is inside succeeds, or raises that error with these words."""
    return _may_refuse


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory):
    """A two-layer Llama with random weights and a word-level tokenizer that adds <bos>. Copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # Large enough that every matrix matters to the output.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path, examples):
    """Write a JSON Lines file and return its path."""
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def choice_task_file(tmp_path_factory):
    """32 examples with two to four choices, some of two tokens."""
    examples = [
        {
            "prompt": f"the {subject} and the {SUBJECTS[i - j]} lives in {'the' if i % 2 else 'a'}",
            "choices": [f"{COLOURS[j]} {place}" if i % 3 == 2 else place for place in PLACES[: 2 + i % 3]],
            "answer": (i * i + j) % (2 + i % 3),
            "group": place,
        }
        for i, subject in enumerate(SUBJECTS)
        for j, place in enumerate(PLACES)
    ]
    return write_lines(tmp_path_factory.mktemp("tasks") / "places.jsonl", examples)


@pytest.fixture(scope="session")
def open_task_file(tmp_path_factory):
    """32 examples whose open answer is one token."""
    examples = [
        {"prompt": f"the colour of the {subject} in the {place} is", "answer": COLOURS[(i * i + j) % 4]}
        for i, subject in enumerate(SUBJECTS)
        for j, place in enumerate(PLACES)
    ]
    return write_lines(tmp_path_factory.mktemp("tasks") / "colours.jsonl", examples)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Four documents of 60 tokens, longer than the model's context."""
    documents = [
        " ".join(VOCABULARY[4 + (7 * i * i + 3 * i + 5 * d) % (len(VOCABULARY) - 4)] for i in range(60))
        for d in range(4)
    ]
    path = tmp_path_factory.mktemp("tasks") / "words.txt"
    path.write_text("\n<|endofdoc|>\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared():
    """The folder of real models and tasks beside the repository, where there is one."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared with real models, which is not here")
    return folder


@dataclass
class Finished:
    """What a run of the program left behind."""

    status: int
    out: str
    err: str


_WORKER = """
import json, os, resource, signal, sys, tempfile
from eckart import cli, ledger

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    request = json.loads(line)
    files = [tempfile.TemporaryFile() for _ in (1, 2)]
    for descriptor, file in zip((1, 2), files):
        os.dup2(file.fileno(), descriptor)
    sys.argv = ["eckart", *request["arguments"]]
    add, left = ledger.Ledger.add, request["die_after"]

    def add_or_die(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        add(*arguments)

    if left is not None:
        ledger.Ledger.add = add_or_die
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"] or hard, hard))
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    ledger.Ledger.add = add
    sys.stdout.flush()
    sys.stderr.flush()
    said = []
    for file in files:
        file.seek(0)
        said.append(file.read().decode())
    print(json.dumps([status, *said]), file=answers, flush=True)
"""


class Program:
    """The command line in a process of its own, kept for the next call since importing torch takes seconds.

    All that reaches file descriptors 1 and 2 is seen, whichever library wrote it.
    """

    def __init__(self):
        self.process = None

    def __call__(self, *arguments, die_after=None, largest_file=None):
        """Run `eckart`; SIGKILL it after so many entries in its ledger, or let no file grow beyond so many bytes."""
        if self.process is None:
            quiet = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | quiet,
            )
        request = {"arguments": [*map(str, arguments)], "die_after": die_after, "largest_file": largest_file}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if answer:
            return Finished(*json.loads(answer))
        return Finished(self.close(), "", "")

    def close(self):
        """End the process and return its status."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.stdin.close()
        process.stdout.close()
        return process.wait()


@pytest.fixture(scope="session")
def program():
    """Run the command line as a process: `program("search", ...)` gives its status and what it printed."""
    running = Program()
    yield running
    running.close()
