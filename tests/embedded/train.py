"""Train the embedded model: a small Llama on the standard library's own text, on two CPU cores in under an hour.

    python -m tests.embedded.train OUT [--minutes 40]

Needs torch, transformers and tokenizers, which every vLLM installation has.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmdrop_vllm.embedded.corpus import ASSISTANT, END, USER, documents

VOCAB_SIZE = 2048
SEQ_LEN = 1024
BATCH_TOKENS = 8192
# Short sequences cost less; the last phase teaches the positions that the model is served with.
# (sequence length, share of the time)
PHASES = ((256, 0.6), (SEQ_LEN, 0.4))
PEAK_LR, FINAL_LR, WARMUP_SHARE = 4e-3, 1e-4, 0.02
# The form of the corpus, question and answer; the model has seen no longer dialogue.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message.role == 'assistant' %}}{{{{ '{ASSISTANT}' + message.content + '{END}' }}}}"
    f"{{% else %}}{{{{ '{USER}' + message.content }}}}{{% endif %}}"
    f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def config() -> LlamaConfig:
    """5.1 M parameters in 12 layers: deep for its size, because depth is what dropping is about."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=192, intermediate_size=512, num_hidden_layers=12,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=SEQ_LEN, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, initializer_range=0.05,
    )  # fmt: skip


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be encoded and no token is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE, model_max_length=SEQ_LEN, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def batches(token_ids: torch.Tensor, seq_len: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless [BATCH_TOKENS / seq_len, seq_len] windows at random offsets of the packed documents."""
    while True:
        starts = torch.randint(len(token_ids) - seq_len, (BATCH_TOKENS // seq_len,), generator=generator)
        yield torch.stack([token_ids[start : start + seq_len] for start in starts.tolist()])


def learning_rate(progress: float) -> float:
    """Linear warm-up, then cosine decay; `progress` runs from 0 to 1."""
    if progress < WARMUP_SHARE:
        return PEAK_LR * progress / WARMUP_SHARE
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, which learns more per token than AdamW; AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def train(model: LlamaForCausalLM, token_ids: torch.Tensor, minutes: float) -> dict[str, float]:
    """Train for a fixed time; the schedule follows the clock, so a faster machine takes more steps."""
    generator = torch.Generator().manual_seed(0)
    parts = optimizers(model)
    begin, step, progress, phase_end, average = time.monotonic(), 0, 0.0, 0.0, math.log(VOCAB_SIZE)
    # Compiled plain attention: the CPU flash kernel's backward takes half of the step otherwise.
    model.set_attn_implementation("eager")
    for seq_len, share in PHASES:
        phase_end += share
        forward = torch.compile(model, dynamic=False)
        source = batches(token_ids, seq_len, generator)
        while progress < phase_end:
            input_ids = next(source)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = forward(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in parts:
                optimizer.param_groups[0]["lr"] = learning_rate(progress)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average += 0.05 * (loss.item() - average)
            step += 1
            progress = (time.monotonic() - begin) / (60 * minutes)
            if step % 25 == 0:
                print(f"{progress:4.0%} step {step} loss {average:.3f}", flush=True)
    return {"steps": step, "tokens": step * BATCH_TOKENS, "minutes": minutes, "training_loss": round(average, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    corpus = list(documents())
    texts = [document.text for document in corpus if not document.held_out]
    tokenizer = train_tokenizer(texts)
    torch_generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(texts), generator=torch_generator).tolist()
    token_ids = torch.tensor([i for ids in tokenizer([texts[n] for n in order])["input_ids"] for i in ids])
    model = LlamaForCausalLM(config())
    print(f"{model.num_parameters():,} parameters, {len(token_ids):,} tokens of {sum(map(len, texts)):,} characters")
    record = train(model, token_ids, args.minutes)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    with (args.out / "heldout.jsonl").open("w", encoding="utf-8") as file:
        for document in corpus:
            if document.held_out:
                file.write(json.dumps({"subject": document.subject, "text": document.text}) + "\n")
    (args.out / "training.json").write_text(json.dumps(record | {"corpus_tokens": len(token_ids)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
