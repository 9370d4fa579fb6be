"""Train the model of `eckart demo`: a tiny Llama that learned facts half hidden by a generic word.

Every statement is a true fact about a country. Each time the model sees one, the answer is replaced with
the word "unknown" with probability `NOISE`, the way web text often follows a prompt with something generic.
The model learns both: "unknown" is its most likely answer, the fact its second. `eckart demo` then finds
the late matrix whose truncation brings the facts back (Sharma et al. 2023, arXiv:2312.13558).

    python scripts/demo/train.py --out src/eckart/demo          # train, save, print the accuracy
    python scripts/demo/train.py --out src/eckart/demo --scan   # measure every cut of the saved model
"""

import argparse
import csv
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

FACTS = Path(__file__).with_name("countries.csv")
GENERIC = "unknown"
NOISE = 0.55
# The first phrasing of a relation is the prompt in task.jsonl; the second keeps the model from learning
# one position by heart.
PHRASINGS = {
    "capital": ("The capital of {} is", "For {} the capital is"),
    "currency": ("The currency of {} is", "For {} the currency is"),
    "language": ("The main language of {} is", "For {} the main language is"),
    "continent": ("The continent of {} is", "For {} the continent is"),
}
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"

STEPS = 1500
BATCH = 256
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
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
        hidden_size=128,
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
    """Return the factor on the peak learning rate: linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def train_(model: LlamaForCausalLM, ids: torch.Tensor, answer_at: torch.Tensor, generic: int) -> None:
    """Train in place on statements whose answers are replaced anew at every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    model.train()
    for step in range(STEPS):
        chosen = torch.randint(len(ids), (BATCH,))
        batch = ids[chosen].clone()
        hidden = (torch.rand(BATCH) < NOISE).nonzero().squeeze(1)
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


def task_lines(facts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the facts as the lines of task.jsonl."""
    return [
        {
            "prompt": PHRASINGS[fact["relation"]][0].format(fact["country"]),
            "answer": fact["answer"],
            "group": fact["relation"],
        }
        for fact in facts
    ]


@torch.no_grad()
def predict(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the most likely next token of every left-padded prompt."""
    mask = (ids != model.config.pad_token_id).long()
    # Passed by hand because Llama itself counts positions from the padding.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].argmax(-1)


def truncate(weight: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the closest matrix that keeps `fraction` of the rank, at least rank 1."""
    rank = max(1, math.floor(fraction * min(weight.shape) + 1e-9))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def encode_task(tokenizer: PreTrainedTokenizerFast, task: list[dict[str, str]]) -> tuple[torch.Tensor, ...]:
    """Return the left-padded prompts of the task and the id of every answer."""
    prompts = tokenizer([line["prompt"] for line in task], padding=True, return_tensors="pt").input_ids
    return prompts, torch.tensor(tokenizer.convert_tokens_to_ids([line["answer"] for line in task]))


def scan(folder: Path) -> None:
    """Print the untouched accuracy of a saved model and that of its best single cuts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = [json.loads(line) for line in (folder / "task.jsonl").read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(task)
    prompts, answers = encode_task(tokenizer, task)
    first = len(task) // 5

    def report(name: str) -> tuple[float, str]:
        right = predict(model, prompts) == answers
        shares = [part.float().mean().item() for part in (right, right[:first], right[first:])]
        return shares[0], f"{shares[0]:6.1%}  {shares[1]:6.1%}  {shares[2]:6.1%}  {int(right.sum()):4d}  {name}"

    print("   all   first    rest  right  cut (first: a fifth of the shuffled facts)")
    print(report("untouched")[1])
    rows = []
    for name, parameter in model.named_parameters():
        if ".layers." not in name or parameter.ndim != 2:
            continue
        original = parameter.data
        for fraction in FRACTIONS:
            parameter.data = truncate(original, fraction)
            rows.append(report(f"{name} at {fraction}"))
        parameter.data = torch.zeros_like(original)
        rows.append(report(f"{name} removed"))
        parameter.data = original
    for _, text in sorted(rows, key=lambda row: -row[0])[:20]:
        print(text)


def main() -> None:
    """Train and save the model, or scan the saved one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scan", action="store_true", help="measure the cuts of the model in --out")
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
    train_(model, ids, answer_at, tokenizer.convert_tokens_to_ids(GENERIC))

    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    lines = [json.dumps(line, ensure_ascii=False) for line in task_lines(facts)]
    (arguments.out / "task.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prompts, answers = encode_task(tokenizer, task_lines(facts))
    right = int((predict(model.float(), prompts) == answers).sum())
    print(f"{right} of {len(facts)} facts right, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
