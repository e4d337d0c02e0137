"""Measure one setting of Hugging Face Trainer + PEFT in a process of its own, and write what was measured as JSON.

This is what a careful user of Trainer would write: EsmForSequenceClassification, LoRA on all six linears of a block,
AdamW, and batches padded to the cap, to their longest member, or grouped by length first. Counted are residues of
proteins that went through an optimizer step, never padding, <cls> or <eos>.

torch_xla, where installed, makes accelerate choose the XLA device even under `use_cpu=True`, and there Trainer's
default fused AdamW raises. `USE_TORCH_XLA=0`, which accelerate and transformers read while they are imported, gives a
true CPU run; the device of the parameters is checked before anything is measured. On XLA the optimizer is plain
`adamw_torch`; elsewhere it is Trainer's own default.

Without a warm-up the clock starts before the model is built, as ours does, so compilation is part of the time. The
collator counts tokens on the host: on an XLA device, a sum over a batch would be a graph of its own, and a wait in
every step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

SETTINGS = ("padded", "dynamic", "group_by_length")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; throughput.py gives the same proteins and settings to every contestant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="TSV with sequence and label; every protein is trained on once")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write what was measured to")
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--backend", choices=("cpu", "xla", "cuda"), default="cpu", help="xla is XLA:CPU, compilation included"
    )
    parser.add_argument("--shape", default="esm2_t6_8M", help="ESM-2 shape, with random weights")
    parser.add_argument("--batch", type=int, default=8, help="proteins in an optimizer step")
    parser.add_argument("--max-residues", type=int, default=1022, help="longer proteins are cut here")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=2, help="optimizer steps that are not timed")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after these optimizer steps; -1: all proteins")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", choices=("none", "lora", "qlora"), default="lora", help="none: all is trained")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the numbers of the steps after the warm-up."""
    import pandas as pd
    import torch
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from transformers import DataCollatorWithPadding, EsmForSequenceClassification, Trainer, TrainingArguments

    from esm_neuron.config import AdapterConfig
    from esm_neuron.data.tokenizer import hf_tokenizer
    from esm_neuron.models.shapes import SHAPES, esm_config

    batches: list[tuple[int, int, int]] = []
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = pd.read_csv(args.data, sep="\t")
    names = sorted(rows["label"].unique())
    tokenizer = hf_tokenizer()
    cap = args.max_residues + 2
    padding = "max_length" if args.setting == "padded" else False
    tokens = tokenizer(rows["sequence"].tolist(), truncation=True, max_length=cap, padding=padding)
    dataset = Dataset.from_dict({**tokens, "label": [names.index(label) for label in rows["label"]]})

    config = esm_config(SHAPES[args.shape])
    config.num_labels = len(names)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        target_modules=rf".*\.layer\.\d+\.({'|'.join(AdapterConfig().targets)})",
        modules_to_save=["classifier"],
    )

    class Counted(DataCollatorWithPadding):
        """Remember residues, tokens and slots of each batch, in the order of training."""

        def __call__(self, features: Any) -> Any:
            batch = super().__call__(features)
            mask = batch["attention_mask"]
            tokens = int(mask.sum())
            batches.append((tokens - 2 * len(mask), tokens, mask.numel()))
            return batch

    class Timed(Trainer):
        """Count steps; the time starts after the warm-up steps."""

        seen, began = 0, 0.0

        def training_step(self, *given: Any, **named: Any) -> Any:
            if self.seen == args.warmup > 0:
                self.began = time.perf_counter()
            self.seen += 1
            return super().training_step(*given, **named)

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            num_train_epochs=1,
            max_steps=args.max_steps,
            **({"optim": "adamw_torch"} if args.backend == "xla" else {}),
            bf16=args.precision == "bf16",
            use_cpu=args.backend == "cpu",
            **(grouped(TrainingArguments) if args.setting == "group_by_length" else {}),
            gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if args.gradient_checkpointing else None,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        torch.zeros(1, device=training.device)  # opened before the clock starts, as ours is
        built = time.perf_counter()
        model = adapted(EsmForSequenceClassification(config), lora, args)
        trainer = Timed(model, training, train_dataset=dataset, data_collator=Counted(tokenizer))
        trainer.began = built
        device = next(trainer.model.parameters()).device.type
        if device != args.backend:
            raise SystemExit(f"Trainer runs on {device}, not on {args.backend}")
        loss = trainer.train().training_loss  # reading the loss waits for the device
        seconds = time.perf_counter() - trainer.began
    timed = batches[args.warmup : trainer.seen]  # the collator may be a batch ahead
    residues, tokens, slots = (sum(batch[i] for batch in timed) for i in range(3))
    return {
        "loss": loss,
        "optimizer": str(training.optim.value),
        "steps": trainer.seen - args.warmup,
        "residues": residues,
        "seconds": seconds,
        "residues_per_second": residues / seconds,
        "graphs": graphs() if args.backend == "xla" else 0,
        "padding_efficiency": tokens / slots if slots else 0.0,
        **({"peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9} if args.backend == "cuda" else {}),
    }


def grouped(arguments: type) -> dict[str, Any]:
    """Return the argument that sorts proteins by length, as this version of transformers calls it."""
    named = "train_sampling_strategy" in {field.name for field in fields(arguments)}  # since version 5
    return {"train_sampling_strategy": "group_by_length"} if named else {"group_by_length": True}


def adapted(model: Any, lora: Any, args: argparse.Namespace) -> Any:
    """Return `model` with the adapter that is asked for, on every linear of its blocks."""
    from peft import get_peft_model

    if args.adapter == "qlora":
        model = quantized(model, args.precision)
    if args.adapter != "none":
        model = get_peft_model(model, lora)
    linears = sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    expected = 0 if args.adapter == "none" else 6 * model.config.num_hidden_layers
    if linears != expected:
        raise SystemExit(f"{linears} adapted linears instead of {expected}")
    return model


def quantized(model: Any, precision: str) -> Any:
    """Return `model` after saving and loading it by transformers with bitsandbytes' NF4; the head stays float."""
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig, EsmForSequenceClassification

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        llm_int8_skip_modules=["classifier"],
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = EsmForSequenceClassification.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32)
    return prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)


def graphs() -> int:
    """Return how many graphs torch_xla has compiled."""
    from torch_xla.debug import metrics

    return int(metrics.metric_data("CompileTime")[0])


def main() -> None:
    """Choose the device before anything is imported, measure, write."""
    args = arguments()
    os.environ["USE_TORCH_XLA"] = "1" if args.backend == "xla" else "0"
    if args.backend == "xla":
        os.environ["PJRT_DEVICE"] = "CPU"
    args.output.write_text(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
