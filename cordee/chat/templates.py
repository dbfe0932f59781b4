"""Chat templates: what one reads, and the one way from messages to text and token ids."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cordee.chat.formats import BadRowError
from cordee.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINKS = ("name", "tool_call_id")
"""Keys of a tool's message that say to which call it belongs; many templates leave them out, as the order says it."""
OTHERWISE = "the chat template renders a prompt otherwise alone than before its answer"
Message = dict[str, Any]


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`, which transformers adds to Jinja; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Read what the template reads.

        Raises:
            UserError: the tokenizer has no chat template, or one that is no Jinja.
        """
        self.tokenizer = tokenizer
        found = tokenizer.chat_template
        if not found:
            raise UserError("its tokenizer has no chat template", file=tokenizer.name_or_path, key="model")
        sources = list(found.values()) if isinstance(found, Mapping) else [found]
        environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
        try:
            trees = [environment.parse(source) for source in sources]
        except TemplateSyntaxError as error:
            raise UserError(
                f"its chat template can't be read: {error}", file=tokenizer.name_or_path, key="model"
            ) from error
        self.variables = {name for tree in trees for name in meta.find_undeclared_variables(tree)}
        """What can be given to it: `tools`, `enable_thinking`, and what it sets itself where it was not given."""
        stored = {node.name for tree in trees for node in tree.find_all(nodes.Name) if node.ctx == "store"}
        self.parameters = self.variables - stored
        """What only a caller can set."""
        self._names = {node.attr for tree in trees for node in tree.find_all(nodes.Getattr)}
        texts = (node.value for tree in trees for node in tree.find_all(nodes.Const))
        self._names |= {text for text in texts if isinstance(text, str)}
        self.has_marks = any(re.search(r"\{%-?\s*generation\s*-?%\}", source) for source in sources)
        """Whether `{% generation %}` marks what carries loss."""
        self._left_out: dict[Any, list[tuple[int, str]]] = {}

    def reads(self, key: str) -> bool:
        """Whether the template names a message's key, as an attribute or as a text."""
        return key in self._names

    def left_out(self, messages: Sequence[Message], options: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Messages (by place) and keys that say something, and that the template does not write.

        `content` and `tool_calls` count, and of the last message every other text: of earlier ones a template may
        drop the reasoning. Found by putting other texts in their place, once for all chats of the same shape.
        """
        given = sorted((name, str(value)) for name, value in options.items() if name not in ("tools", "documents"))
        shape = (
            tuple((message["role"], *(key for key in message if _says(message[key]))) for message in messages),
            *given,
            *(name for name in ("tools", "documents") if name in options),
        )
        if shape not in self._left_out:
            self._left_out[shape] = self._probe(messages, options)
        return self._left_out[shape]

    def require_written(self, messages: Sequence[Message], options: Mapping[str, Any]) -> None:
        """See that what each message says is written: some templates leave out roles that they don't know.

        Raises:
            BadRowError: something is left out.
        """
        for place, key in self.left_out(messages, options):
            problem = f"the chat template leaves out the {key!r} of a message of the {messages[place]['role']!r}"
            hint = "" if key == "content" else f"`ignore: [{key}]` beside the file's path leaves it out"
            raise BadRowError(problem, f"message {place + 1}", hint)

    def _probe(self, messages: Sequence[Message], options: Mapping[str, Any]) -> list[tuple[int, str]]:
        places: dict[str, tuple[int, str]] = {}
        probes = [dict(message) for message in messages]
        for place, message in enumerate(messages):
            for key, value in message.items():
                mark, is_last = f"probe{place}{key.replace('_', '')}", place == len(messages) - 1
                if key == "tool_calls":
                    probes[place][key] = [_renamed(call, mark) for call in value]
                elif key == "content" and isinstance(value, list):
                    probes[place][key] = [{"type": "text", "text": mark}]
                elif _says(value) and (key == "content" or (is_last and key not in ("role", *LINKS))):
                    probes[place][key] = mark
                else:
                    continue
                places[mark] = place, key
        try:
            text = self.text(probes, options)
        except BadRowError:  # it takes no text but certain ones
            return []
        return [where for mark, where in places.items() if mark not in text]

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Finds a special token spelled out in a text, where it would become the token itself."""
        return special_tokens(self.tokenizer)

    def require_plain(self, texts: Iterable[str], where: str = "") -> None:
        """See that no text spells out a special token, or can't be encoded.

        Raises:
            BadRowError: one does.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise BadRowError("a text holds half of a surrogate pair, which is no character", where) from error
            if found := self.special.search(text):
                raise BadRowError(f"a text spells out the special token {found.group()!r}", where)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        added = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added | {*self.tokenizer.all_special_ids})

    @cached_property
    def generation_prompt(self) -> str:
        """What begins an answer, such as `<|im_start|>assistant` and a new line; empty where the template has none."""
        question = [{"role": "user", "content": "?"}]
        without, with_prompt = self.text(question, {}), self.text(question, {}, add_generation_prompt=True)
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token that stands first behind an answer; None where there is none."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "qzx"}]
        try:
            _, _, behind = self.text(chat, {}).rpartition("qzx")
        except BadRowError:  # it takes no such chat
            return None
        (ids,) = self.encode([behind])["input_ids"]
        return next((int(number) for number in ids if number in self.special_ids), None)

    def text(self, messages: Sequence[Message], options: Mapping[str, Any], **how: Any) -> str:
        """What the template writes; `options` are the row's own (`tools`, `enable_thinking`, …).

        Raises:
            BadRowError: it refuses the messages.
        """
        return str(self._apply(messages, options, tokenize=False, **how))

    def prompt(self, before: Sequence[Message], options: Mapping[str, Any], whole: Sequence[str]) -> tuple[str, int]:
        """The generation prompt after these messages, and how much of it the whole texts have to contain.

        That is all of it, or all but its generation prompt: some templates end a prompt in another way than an answer
        begins (DeepSeek's with `<think>`).
        """
        prompt = self.text(before, options, add_generation_prompt=True)
        if all(text.startswith(prompt) for text in whole):
            if not self.has_marks:
                return prompt, len(prompt)
            if prompt.endswith(self.generation_prompt):  # which marks may take in
                return prompt, len(prompt) - len(self.generation_prompt)
        return prompt, self.end_in(prompt, self.text(before, options)) or len(prompt)

    def end_in(self, whole: str, beginning: str) -> int:
        """Where the beginning of a chat ends in a longer one's text; 0 if it is rendered otherwise there.

        Only special tokens behind its end of turn may differ (Phi-3 ends a chat, but no turn within it, with one more).
        """
        end = common_length(whole, beginning)
        if end == len(beginning):
            return end
        for found in self.special.finditer(beginning):
            if found.start() < end < found.end():
                end = found.start()
        kept = beginning[:end].rstrip()
        is_closed = any(found.end() == len(kept) for found in self.special.finditer(kept))
        return end if is_closed and not self.special.sub("", beginning[end:]).strip() else 0

    def encode(self, texts: Sequence[str], **how: Any) -> Any:
        """Token ids of rendered texts, to which the tokenizer adds no special tokens: the template has written them."""
        return self.tokenizer(list(texts), add_special_tokens=False, **how)

    def encode_chats(self, chats: Sequence[Sequence[Message]], options: Mapping[str, Any]) -> Any:
        """Token ids of chats, with their offsets, and masks of what the template marks by `{% generation %}`."""
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        return self._apply(chats, options, tokenizer_kwargs={"return_offsets_mapping": True}, **how)

    def _apply(self, messages: Sequence[Any], options: Mapping[str, Any], **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), **options, **how)
        except Exception as error:  # a template raises jinja2's errors, and whatever its filters raise
            raise BadRowError(f"the chat template refuses it: {' '.join(str(error).split())}") from error


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Finds a special token spelled out in a text, where it would become the token itself."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters or tokens two sequences share at their beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])


def _says(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list) and bool(value)


def _renamed(call: Any, name: str) -> Any:
    """A tool call with another name."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}
