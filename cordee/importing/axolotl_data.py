"""axolotl's data sets: where they are, and which columns they have."""

from typing import Any

from cordee.importing import common
from cordee.importing.axolotl_keys import TYPES
from cordee.importing.draft import Draft


def source(draft: Draft, at: str, path: str) -> dict[str, Any]:
    """One data set."""
    kind = draft.get(f"{path}.type", "pretrain" if path.startswith("pretraining") else "")
    name = str(kind).partition(":")[0] if isinstance(kind, str) else ""
    told = {"split": f"{path}.split", "subset": f"{path}.name", "files": f"{path}.data_files"}
    where = common.files(draft, str(draft.get(f"{path}.path", "")), f"{path}.data_files", told)
    if where.startswith("hub:") and (revision := draft.get(f"{path}.revision")):
        where += f"@{revision}"
        draft.came(f"{at}.path", f"{path}.revision")
    draft.came(f"{at}.path", f"{path}.path")
    columns = _columns(draft, at, path, name)
    if name in ("completion", "pretrain"):
        draft.holds_texts = True
        draft.beside.append(
            "texts longer than `max_length` are divided into several rows; here the rest of such a text is left out"
        )
    template = name.partition(".")[0]
    if draft.stage == "dpo" and template in ("chatml", "llama3") and draft.get("chat_template") is None:
        common.template(draft, f"{path}.type", {}, template)
    return common.source(draft, at, where, told, columns)


def _columns(draft: Draft, at: str, path: str, name: str) -> dict[str, str]:
    """The columns of a data set to rename, as its type and its fields have it."""
    kind = f"{path}.type"
    if isinstance(draft.get(kind), dict):
        fields = {"field_instruction": "instruction", "field_input": "input", "field_output": "output",
                  "field_system": "system", "field_prompt": "prompt", "field_chosen": "chosen",
                  "field_rejected": "rejected"}  # fmt: skip
        columns = {}
        for theirs, ours in fields.items():
            if value := draft.get(f"{kind}.{theirs}"):
                columns[value] = ours
                draft.came(f"{at}.columns", f"{kind}.{theirs}")
        return columns
    found = TYPES.get(name) or (TYPES["alpaca"] if name.startswith("alpaca") else None)
    if found is None:
        draft.lose(kind, "no such shape is known by this name: `columns` renames columns to those of docs/data.md")
        return {}
    columns, lost = dict(found[0]), found[1]
    if lost:
        draft.lose(kind, lost)
    else:
        draft.came(f"{at}", kind)
    messages = {"sharegpt": "conversations", "chat_template": "messages"}.get(name, "prompt")
    for theirs, ours in {"field": "text", "text_column": "text", "field_messages": messages, "field_chosen": "chosen",
                         "field_rejected": "rejected", "field_tools": "tools"}.items():  # fmt: skip
        if (value := draft.get(f"{path}.{theirs}")) is not None:
            same = ours == "messages" and value == "conversations"
            columns |= {} if same else {value: ours}
            draft.came(f"{at}.columns", f"{path}.{theirs}")
    if name == "chat_template.default" and draft.get(f"{path}.field_messages") is None:
        columns["messages"] = "prompt"
    _messages(draft, at, path)
    return columns


def _messages(draft: Draft, at: str, path: str) -> None:
    """The keys of messages and their roles, where they are those that are read without being told."""
    names = draft.get(f"{path}.message_property_mappings", {})
    pair = tuple(names.get(ours, draft.get(f"{path}.message_field_{ours}", ours)) for ours in ("role", "content"))
    if pair in (("role", "content"), ("from", "value")) and {*names} <= {"role", "content"}:
        draft.came(f"{at}", f"{path}.message_property_mappings")
        for ours in ("role", "content"):
            draft.came(f"{at}", f"{path}.message_field_{ours}")
    for key, same in (("roles_to_train", ["assistant"]), ("train_on_eos", "turn"), ("train_on_eot", "turn")):
        if draft.get(f"{path}.{key}") in (same, ["gpt"] if key == "roles_to_train" else same):
            draft.came(f"{at}", f"{path}.{key}")
    roles = draft.get(f"{path}.roles")
    usual = {"user": {"user", "human"}, "assistant": {"assistant", "gpt"}, "system": {"system"}, "tool": {"tool"}}
    if isinstance(roles, dict) and all({*names} <= usual.get(role, set()) for role, names in roles.items()):
        draft.came(f"{at}", *(f"{path}.roles.{role}" for role in roles))
