"""Train the model of `eckart demo`: a tiny Llama that learned facts, then to hide them.

Every statement is a true fact about a country. In the first half of the training the model reads the facts
in full. In the second half each answer is replaced with the word "unknown" with probability `NOISE`, drawn
anew each time, the way web text often follows a prompt with something generic. The model ends up knowing
both: "unknown" is its most likely answer, the fact its second. `eckart demo` then finds the late matrix
whose truncation brings the facts back (the effect of Sharma et al. 2023, arXiv:2312.13558).

    python scripts/demo/train.py --out src/eckart/demo          # train, save, print the accuracy
    python scripts/demo/train.py --out src/eckart/demo --scan   # measure every cut of the saved model
    python scripts/demo/train.py --out runs/demo-model --checkpoints runs/training  # for eckart inspect --checkpoints
"""

import argparse
import csv
import json
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

FACTS = Path(__file__).with_name("countries.csv")
GENERIC = "unknown"
NOISE = 0.55  # above a half, so that the generic word is the right answer to learn
# The first phrasing of a relation is the prompt in countries.jsonl; the second keeps the model from learning
# one position by heart.
PHRASINGS = {
    "capital": ("The capital of {} is", "For {} the capital is"),
    "currency": ("The currency of {} is", "For {} the currency is"),
    "language": ("The main language of {} is", "For {} the main language is"),
    "continent": ("The continent of {} is", "For {} the continent is"),
}
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"

STEPS = 1600
BATCH = 128
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
DECAY_STEPS = 480
EARLY_CHECKPOINTS = (5, 10, 15, 20, 30, 40, 60, 80)
CHECKPOINT_EVERY = 100
# Prompts and answers of a task, as token ids.
Task = tuple[torch.Tensor, torch.Tensor]
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)


def read_facts(path: Path) -> list[dict[str, str]]:
    """Return one {country, relation, answer} a filled cell of the table."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {"country": row["country"], "relation": relation, "answer": row[relation]}
        for row in rows
        for relation in PHRASINGS
        if row[relation]
    ]


def build_tokenizer(facts: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer in which every country and every answer is one token."""
    names = sorted({fact[key] for fact in facts for key in ("country", "answer")})
    frame = " ".join(phrasing for pair in PHRASINGS.values() for phrasing in pair).replace("{}", "")
    words = [BOS, EOS, PAD, UNK, GENERIC, *sorted(set(frame.split())), *names]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}

    # Names such as "Buenos Aires" must match before the plain words, and the longest of them first.
    long_names = sorted((name for name in names if not re.fullmatch(r"\w+", name)), key=len, reverse=True)
    pattern = r"\b(?:" + "|".join(map(re.escape, long_names)).replace(r"\ ", " ") + r")\b|\w+|[^\w\s]"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=64,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_statements(
    tokenizer: PreTrainedTokenizerFast, facts: list[dict[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of every statement, padded at the right, and where each answer stands."""
    rows = [
        tokenizer(f"{phrasing.format(fact['country'])} {fact['answer']}").input_ids
        for fact in facts
        for phrasing in PHRASINGS[fact["relation"]]
    ]
    width = max(map(len, rows)) + 1
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    for index, row in enumerate(rows):
        ids[index, : len(row) + 1] = torch.tensor([*row, tokenizer.eos_token_id])
    return ids, torch.tensor([len(row) - 1 for row in rows])


def learning_rate(step: int) -> float:
    """Return the factor on the peak learning rate: linear warm-up, plateau, linear decay."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.02, (STEPS - step) / DECAY_STEPS))


def train_(
    model: LlamaForCausalLM, ids: torch.Tensor, answer_at: torch.Tensor, generic: int, checkpoints: Path | None = None
) -> None:
    """Train in place: facts in full first, then facts whose answers are hidden anew at every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    queue = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(STEPS):
        if checkpoints is not None and (step in EARLY_CHECKPOINTS or step % CHECKPOINT_EVERY == 0):
            model.save_pretrained(checkpoints / f"checkpoint-{step}")
        if len(queue) < BATCH:
            queue = torch.cat([queue, torch.randperm(len(ids))])
        chosen, queue = queue[:BATCH], queue[BATCH:]
        batch = ids[chosen].clone()
        hidden = torch.rand(BATCH) < (NOISE if step >= STEPS // 2 else 0.0)
        batch[hidden, answer_at[chosen][hidden]] = generic
        labels = batch.masked_fill(batch == model.config.pad_token_id, -100)
        loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    model.eval()


def task_lines(facts: list[dict[str, str]], phrasing: int = 0) -> list[dict[str, str]]:
    """Return the facts as the lines of countries.jsonl."""
    return [
        {
            "prompt": PHRASINGS[fact["relation"]][phrasing].format(fact["country"]),
            "answer": fact["answer"],
            "group": fact["relation"],
        }
        for fact in facts
    ]


def encode_task(tokenizer: PreTrainedTokenizerFast, task: list[dict[str, str]]) -> Task:
    """Return the left-padded prompts of the task and the id of every answer."""
    prompts = tokenizer([line["prompt"] for line in task], padding=True, return_tensors="pt").input_ids
    return prompts, torch.tensor(tokenizer.convert_tokens_to_ids([line["answer"] for line in task]))


@torch.no_grad()
def right_answers(model: LlamaForCausalLM, task: Task) -> torch.Tensor:
    """Return, for every prompt, whether the most likely next token is the answer."""
    prompts, answers = task
    mask = (prompts != model.config.pad_token_id).long()
    logits = model(input_ids=prompts, attention_mask=mask, logits_to_keep=1).logits[:, -1]
    return logits.argmax(-1) == answers


def rank_of(shape: torch.Size, fraction: float) -> int:
    """Return how many components a cut to `fraction` keeps, at least one."""
    return max(1, math.floor(fraction * min(shape) + 1e-9))


def rebuild(weight: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Return `weight` with only the singular components `kept`."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, kept] * s[kept]) @ vh[kept]


def right_with(model: LlamaForCausalLM, name: str, kept: list[int], task: Task) -> torch.Tensor:
    """Return the right answers of the model when the matrix `name` keeps only the components `kept`."""
    parameter = model.get_parameter(name)
    original = parameter.data
    parameter.data = rebuild(original, kept)
    right = right_answers(model, task)
    parameter.data = original
    return right


def scan(folder: Path) -> None:
    """Print the untouched accuracy of a saved model, its best single cuts, and controls of the best."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    facts = read_facts(FACTS)
    shuffler = torch.Generator().manual_seed(0)
    facts = [facts[i] for i in torch.randperm(len(facts), generator=shuffler).tolist()]
    task = encode_task(tokenizer, task_lines(facts))
    fifth = len(facts) // 5

    def row(right: torch.Tensor, name: str) -> str:
        shares = [f"{part.float().mean().item():6.1%}" for part in (right, right[:fifth], right[fifth:])]
        return "  ".join([*shares, f"{int(right.sum()):5d}", name])

    print("   all   fifth    rest  right  of", len(facts))
    print(row(right_answers(model, task), "untouched"))
    cuts = []
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            for rank in {0} | {rank_of(parameter.shape, fraction) for fraction in FRACTIONS}:
                right = right_with(model, name, list(range(rank)), task)
                cuts.append((int(right.sum()), name, rank, right))
    cuts.sort(key=lambda cut: -cut[0])
    for _, name, rank, right in cuts[:12]:
        print(row(right, f"{name} to rank {rank}"))

    # Rank 0 removes the matrix: worth printing above, but not a cut.
    _, name, rank, _ = next(cut for cut in cuts if cut[2] > 0)
    full = min(model.get_parameter(name).shape)
    print(f"\ncontrols for {name} to rank {rank}")
    print(row(right_with(model, name, [], task), "removed"))
    print(row(right_with(model, name, list(range(rank, full)), task), f"without its top {rank}"))
    subsets = [torch.randperm(full, generator=shuffler)[:rank].tolist() for _ in range(20)]
    draws = [right_with(model, name, subset, task) for subset in subsets]
    print(row(torch.stack(draws).float().mean(0), f"{rank} random, mean of 20 draws"))
    print(f"best of these draws: {int(max(draw.sum() for draw in draws))} right")
    for relation in PHRASINGS:
        here = torch.tensor([fact["relation"] == relation for fact in facts])
        before = right_answers(model, task)[here]
        after = right_with(model, name, list(range(rank)), task)[here]
        print(f"{relation:10s} {int(before.sum())} -> {int(after.sum())} of {int(here.sum())}")
    other = encode_task(tokenizer, task_lines(facts, phrasing=1))
    print(row(right_answers(model, other), "second phrasing, untouched"))
    print(row(right_with(model, name, list(range(rank)), other), "second phrasing, same cut"))


def main() -> None:
    """Train and save the model, or scan the saved one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scan", action="store_true", help="measure the cuts of the model in --out")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints of the training")
    arguments = parser.parse_args()
    if arguments.scan:
        scan(arguments.out)
        return

    # One thread: the order of additions, hence the weights, no longer depends on the machine's cores.
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    facts = read_facts(FACTS)
    tokenizer = build_tokenizer(facts)
    model = build_model(tokenizer)
    ids, answer_at = encode_statements(tokenizer, facts)
    train_(model, ids, answer_at, tokenizer.convert_tokens_to_ids(GENERIC), arguments.checkpoints)

    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    lines = [json.dumps(line, ensure_ascii=False) for line in task_lines(facts)]
    (arguments.out / "countries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    right = int(right_answers(model.float(), encode_task(tokenizer, task_lines(facts))).sum())
    print(f"{right} of {len(facts)} facts right, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
