"""Training after the closed form: the student's next tokens are drawn to the teacher's on the answers.

The loop is Transformers' Trainer, adapters are PEFT's and are merged in the end: the checkpoint keeps its shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint

from llmdrop_vllm.artifacts import sha256
from llmdrop_vllm.healing.records import Training
from llmdrop_vllm.healing.run import Run
from llmdrop_vllm.healing.targets import Targets, divergence
from llmdrop_vllm.hf import decoder_layers
from llmdrop_vllm.scoring.batches import Batches


@dataclass(frozen=True)
class TrainOptions:
    """`rank` of the adapters, None for full weights; `parts` of the layers from the first that lost something on.

    A step has about `step_tokens` tokens; held-out KL is asked `checks` times an epoch, and training ends when it has
    not fallen `patience` times in a row.
    """

    epochs: float = 3
    learning_rate: float = 2e-4
    rank: int | None = None
    parts: Literal["mlp", "all"] = "mlp"
    step_tokens: int = 2048
    checks: int = 2
    patience: int = 3
    seed: int = 0

    @property
    def method(self) -> str:
        """For people."""
        how = "full weights" if self.rank is None else f"LoRA of rank {self.rank}"
        return f"{how}, {'MLPs' if self.parts == 'mlp' else 'all'} of the layers from the first drop on"


class Student(nn.Module):
    """A model with its loss; what it saves and loads are the weights that are trained, and no others."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        counted: torch.Tensor,
        token_ids: torch.Tensor,
        log_probabilities: torch.Tensor,
        return_loss: bool = True,  # by which Trainer knows that there is a loss without labels
    ) -> dict[str, torch.Tensor]:
        """input_ids and counted [batch, tokens], the teacher's [positions, k]; the mean KL of the counted positions."""
        logits = self.model(input_ids=input_ids, use_cache=False).logits[counted]
        return {"loss": divergence(logits, token_ids, log_probabilities).mean()}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Those that are trained."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Those that are there; the others are none that it lacks."""
        found = super().load_state_dict(state_dict, strict=False)
        return type(found)([], found.unexpected_keys)


def _collated(batches: Batches, targets: Targets, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of sequences, padded at their right, and what the teacher says of them."""
    sequences = [torch.from_numpy(row["input_ids"]) for row in rows]
    counted = torch.zeros(len(rows), max(map(len, sequences)), dtype=torch.bool)
    for each, sequence, row in zip(counted, sequences, rows, strict=True):
        each[batches.starts[row["number"]] : len(sequence)] = True
    said = (targets.of(row["number"]) for row in rows)
    token_ids, log_probabilities = (torch.cat(each) for each in zip(*said, strict=True))
    # The last token again as padding: no position that counts looks at it.
    input_ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=int(sequences[0][-1]))
    # As `Student.forward` takes it.
    return {"input_ids": input_ids, "counted": counted, "token_ids": token_ids, "log_probabilities": log_probabilities}


def trained_names(model: Any, run: Run, options: TrainOptions) -> list[str]:
    """The parameters that are trained: of the layers from the first that lost something on, MLPs or everything."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    family, (_, no_mlp) = run.family, run.family.absent(run.mask)
    found = []
    for index, layer in [*enumerate(decoder_layers(model, run.mask.num_hidden_layers))][run.first_lost :]:
        kept = family.mixer(index) if index in no_mlp else family.mlp_of(index)
        part = layer if options.parts == "all" or kept is None else getattr(layer, kept.transformers_module)
        found += [names[id(parameter)] for parameter in part.parameters()]
    return found


def sequences_per_step(lengths: Sequence[int], options: TrainOptions) -> int:
    """How many of the sequences with these lengths make a step."""
    return max(1, round(options.step_tokens * len(lengths) / sum(lengths)))


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether products of matrices are, in training there; sums and what is trained are float32."""
    here = torch.cpu.get_capabilities()
    return device.type == "cuda" or any(here.get(name) for name in ("amx_bf16", "avx512_bf16"))


def distill(
    model: Any, run: Run, targets: Targets, options: TrainOptions, log_directory: Path | None, *, progress: bool
) -> tuple[Training, list[str]]:
    """Train the run's student in place; what was gained, and the names of the trained parameters.

    The run's directory keeps what an interrupted training goes on from.
    """
    # Of other options, another's weights would be gone on with.
    directory = run.scratch.directory / f"training-{sha256([asdict(options)])}"
    names, streams = trained_names(model, run, options), run.streams
    model = _trainable(model, names, options.rank)
    # Trainer groups them by their tokens.
    rows = [{"number": number, "input_ids": each} for number, each in enumerate(streams.batches.sequences)]
    learnt, judged = streams.parted(rows)
    lengths = [len(row["input_ids"]) for row in learnt]
    per_step = sequences_per_step(lengths, options)
    steps_per_epoch = -(-len(learnt) // per_step)
    callbacks = [EarlyStoppingCallback(options.patience)]
    if log_directory is not None:
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(log_directory))))
    trainer = Trainer(
        Student(model),
        _arguments(options, model.device, directory, per_step, steps_per_epoch, progress),
        data_collator=partial(_collated, streams.batches, targets),
        train_dataset=learnt,
        eval_dataset=judged,
        callbacks=callbacks,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.add_callback(_Begun(before))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(directory) if directory.is_dir() else None)
    after = trainer.evaluate()["eval_loss"]
    if options.rank is not None:
        model.merge_and_unload()  # into the model that was given
    epochs = trainer.state.global_step / steps_per_epoch
    training = Training(
        method=options.method,
        epochs=epochs,
        learning_rate=options.learning_rate,
        tokens_seen=round(sum(lengths) * epochs),
        kl_before=before,
        kl_after=after,
        history=_history(trainer.state.log_history),
    )
    return training, names


class _Begun(TrainerCallback):
    """A training that breaks the model and then mends its own damage has gained nothing until it is where it began."""

    def __init__(self, before: float) -> None:
        self.before = before

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.best_metric is None:
            state.best_metric = self.before


def _history(log: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], ...]:
    """By step, what was learnt from or judged by."""
    kept = ("step", "loss", "eval_loss")
    rows = ({name: float(each[name]) for name in kept if name in each} for each in log)
    return tuple(row for row in rows if len(row) > 1)


def _trainable(model: Any, names: Sequence[str], rank: int | None) -> Any:
    """With these parameters open to change; with a rank, instead of that, adapters on the linear modules that they
    belong to, and on experts that are one parameter.
    """
    model.requires_grad_(False)
    if rank is None:
        for parameter in map(model.get_parameter, names):
            parameter.data = parameter.data.float()  # steps are smaller than bfloat16 can tell
            parameter.requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    owners = {name: name.rpartition(".")[0] for name in names}
    linear = {each for each in owners.values() if isinstance(model.get_submodule(each), nn.Linear | Conv1D)}
    others = (name for name, owner in owners.items() if owner not in linear)
    experts = [name for name in others if model.get_parameter(name).dim() == 3]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=sorted(linear), target_parameters=experts or None, lora_dropout=0.0
    )
    return get_peft_model(model, config)


def _arguments(
    options: TrainOptions, device: torch.device, directory: Path, per_step: int, per_epoch: int, progress: bool
) -> TrainingArguments:
    check = max(1, per_epoch // options.checks)
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, per_epoch // 4),
        per_device_train_batch_size=per_step,
        per_device_eval_batch_size=per_step,
        bf16=multiplies_in_bfloat16(device),
        use_cpu=device.type != "cuda",
        seed=options.seed,
        train_sampling_strategy="group_by_length",  # with answers of all lengths a third of a batch is padding
        eval_strategy="steps",
        eval_steps=check,
        save_strategy="steps",
        save_steps=check,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=max(1, check // 4),
        disable_tqdm=not progress,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=device.type == "cuda",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or each GPU that is there would add to a step
    return arguments
