"""torchtune's builders and keys: which are known here, which have no counterpart, which no meaning."""

from cordee.importing import common
from cordee.importing.draft import Tables

OPTIMIZERS = {
    "torch.optim.AdamW": "adamw_torch",
    "torch.optim.SGD": "sgd",
    "torch.optim.Adagrad": "adagrad",
    "bitsandbytes.optim.AdamW8bit": "adamw_bnb_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "torchao.prototype.low_bit_optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.prototype.low_bit_optim.AdamW4bit": "adamw_torch_4bit",
    "torchao.optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.optim.AdamW4bit": "adamw_torch_4bit",
}
"""Optimizer → its name in transformers."""
PROMPTED = {"input": "prompt", "output": "completion"}
DATASETS: dict[str, tuple[str, dict[str, str], str]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", {}, "alpaca"),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", {}, "alpaca"),
    "chat_dataset": ("", {}, "chat"),
    "instruct_dataset": ("", PROMPTED, "instruct"),
    "preference_dataset": ("", {}, "pair"),
    "text_completion_dataset": ("", {}, "text"),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", {}, "chat"),
    "samsum_dataset": ("Samsung/samsum", {"dialogue": "prompt", "summary": "completion"}, "instruct"),
    "grammar_dataset": ("liweili/c4_200m", PROMPTED, "instruct"),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", {"page": "text"}, "text"),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", {"article": "text"}, "text"),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", {}, "pair"),
    "stack_exchange_paired_dataset": (
        "lvwerra/stack-exchange-paired",
        {"question": "prompt", "response_j": "chosen", "response_k": "rejected"},
        "pair",
    ),
}
"""Builder → its data set on the hub, columns to rename, shape."""
NOT_HERE = {
    "teacher_model": "knowledge distillation",
    "ppo_epochs": "PPO or GRPO",
    "grpo_samples": "GRPO",
    "reward_functions": "GRPO",
    "policy_model": "PPO",
    "orchestration": "GRPO",
}
"""Keys of the methods that are not here."""
TABLES = Tables(
    felt={
        "*.train_on_input": "only answers carry loss; a `text` column is trained on as a whole",
        "*.new_system_prompt": "rows say it, in a column `system` or as a message",
        "max_steps_per_epoch": "an epoch has all its steps: `trainer: {max_steps: …}` ends a training early",
        "*.filter_fn": "rows are filtered before they are read",
        "ref_checkpointer*": "the reference is the model that training starts from",
        "*.partition": "`limit` and `shuffle` read a part of the rows",
        "*.conversation_style": "messages have `role` and `content`, or `from` and `value`",
        "tokenizer.prompt_template": "a chat template writes turns: `chat_template: FILE`",
        "tokenizer.special_tokens_path": "the tokenizer is the one in the model's folder",
        "*.split_across_pack": "rows are packed whole",
        "*.packed": "rows are packed by `trainer: {packing: true}`",
        "loss.label_smoothing": "TRL's loss `sigmoid` reads none; `robust` is another loss, which does",
        "loss*": "cross entropy, or TRL's losses of DPO",
        "lr_scheduler*": "the learning rate is constant; `lr_scheduler_type` takes the schedules of transformers",
        "optimizer.*": "an argument of the optimizer that `trainer:` has no key for",
        "quantizer*": "quantization-aware training is not here: the model is trained as it is",
        "checkpointer.adapter_checkpoint": "`model:` takes an adapter's folder",
        "model.*": "an argument of the model's builder: the model is as its folder has it",
        "fp8*": "trained in bfloat16 or float32",
        "enable_fp8_training": "trained in bfloat16 or float32",
        "collate_fn": "rows are joined as the trainer does it",
        "dtype": "trained in bfloat16 or float32",
    },
    felt_off={
        "shuffle": "rows are drawn at random",
        "*.add_eos": "a text ends with the tokenizer's eos",
    },
    absent={
        "custom_sharded_layers": common.LAUNCH,
        "fsdp*": common.LAUNCH,
        "tensor_parallel_*": common.LAUNCH,
        "data_parallel_*": common.LAUNCH,
        "context_parallel_*": common.LAUNCH,
        "memory_efficient_fsdp_wrap": common.LAUNCH,
        "low_cpu_ram": common.LAUNCH,
        "run_val_every_n_steps": common.EVALS,
    },
    idle={
        **dict.fromkeys(("metric_logger*", "log_*", "profiler*", "name"), common.TRACKERS),
        **dict.fromkeys(("output_dir", "checkpointer.output_dir"), common.FOLDERS),
        **dict.fromkeys(("tokenizer", "tokenizer._component_", "tokenizer.path", "tokenizer.merges_file",
                         "checkpointer.*"), "the model's folder tells it"),
        **dict.fromkeys(("tokenizer.max_seq_len",), "null sets no limit; see `overlong`"),
        **dict.fromkeys(("resume_from_checkpoint", "save_adapter_weights_only", "save_every_n_*"), common.SAVES),
        **dict.fromkeys(("device", "enable_activation_offloading", "optimizer_in_bwd", "ac_mode", "ac_option",
                         "enable_activation_checkpointing", "use_distributed_state_dict"),
                        "where a training runs and keeps its memory: no result depends on it"),
        **dict.fromkeys(("batch_size_val", "dataset_val.packed"), common.EVALS),
        **dict.fromkeys(("use_flex",), common.KERNELS),
    },
)  # fmt: skip
