"""Chat templates: what one reads, and the one way from messages to text and token ids."""

import contextlib
import datetime as dt
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cordee.chat.problems import BadRowError
from cordee.chat.spelling import Message, part, spellings
from cordee.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINKS = ("name", "tool_call_id")
"""Keys of a tool's message that say to which call it belongs; many templates leave them out, as the order says it."""
OTHERWISE = "the chat template renders a prompt differently when its answer follows"
KNOWN_TAILS = 1000
SAID = ("content", "tool_calls")
"""What of a message a template has to write."""


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
        self.writes_date = "strftime_now" in self.variables
        """Whether it writes the day's date, as Llama 3.2's does: chats then have other ids tomorrow."""
        self.now = dt.datetime.now().astimezone()  # read once: a chat's texts are compared with each other
        self._left_out: dict[Any, list[tuple[int, str]]] = {}
        self._tails: dict[str, list[int]] = {}

    def reads(self, key: str) -> bool:
        """Whether the template names a message's key, as an attribute or as a text."""
        return key in self._names

    def left_out(
        self, messages: Sequence[Message], options: Mapping[str, Any], ends: Collection[int] = ()
    ) -> list[tuple[int, str]]:
        """Messages (by place) and keys that say something, and that the template does not write.

        `content` and `tool_calls` count, and of the last message every other text: of earlier ones a template may
        drop the reasoning. Found by putting other texts in their place, once for all chats of the same shape.

        Args:
            messages: the chat.
            options: what else the template is given.
            ends: lengths of beginnings of the chat that are looked at as well.
        """
        given = sorted((name, str(value)) for name, value in options.items() if name not in ("tools", "documents"))
        shape = (
            tuple((message["role"], *((key, _kind(value)) for key, value in message.items())) for message in messages),
            *given,
            *(name for name in ("tools", "documents") if name in options),
            *ends,
        )
        if shape not in self._left_out:
            lost = [where for end in (*ends, len(messages)) for where in self._probe(messages[:end], options)]
            self._left_out[shape] = list(dict.fromkeys(lost))
        return self._left_out[shape]

    @cached_property
    def takes_text(self) -> bool:
        """Whether a message's content may be a text; SmolVLM's template writes nothing but lists of parts."""
        return self._writes("probe") or not self._writes(part("probe"))

    def _writes(self, content: Any) -> bool:
        try:
            return "probe" in self.text([{"role": "user", "content": content}], {})
        except BadRowError:
            return False

    def readable(self, messages: list[Message], options: Mapping[str, Any]) -> list[Message]:
        """The messages in the spelling that the template reads: of several, the first that it writes in full."""
        found = spellings(messages, takes_text=self.takes_text)
        for spelled in found if len(found) > 1 else ():
            with contextlib.suppress(BadRowError):
                self.text(spelled, options)
                if not any(key in SAID for _, key in self.left_out(spelled, options)):
                    return spelled
        return found[0]

    def require_written(
        self, messages: Sequence[Message], options: Mapping[str, Any], ends: Collection[int] = ()
    ) -> None:
        """See that what each message says is written: some templates leave out roles that they don't know.

        Raises:
            BadRowError: something is left out; arguments as for `left_out`.
        """
        for place, key in self.left_out(messages, options, ends):
            problem = f"the chat template leaves out the {key!r} of a message of the {messages[place]['role']!r}"
            hint = "" if key == "content" else f"`ignore: [{key}]` beside the file's path leaves it out"
            raise BadRowError(problem, f"message {place + 1}", hint)

    def _probe(self, messages: Sequence[Message], options: Mapping[str, Any]) -> list[tuple[int, str]]:
        places: dict[str, tuple[int, str]] = {}
        probes = [dict(message) for message in messages]
        for place, message in enumerate(messages):
            for key, value in message.items():
                counts, is_last = key in SAID, place == len(messages) - 1
                if not _kind(value) or not (counts or (is_last and key not in ("role", *LINKS))):
                    continue
                items = value if counts and isinstance(value, list) else [value]
                marks = [f"probe{place}{key.replace('_', '')}{item}x" for item in range(len(items))]
                if key == "tool_calls":
                    probes[place][key] = list(map(_renamed, items, marks))
                elif items is value:
                    probes[place][key] = [{"type": "text", "text": mark, f"key{mark}": ""} for mark in marks]
                else:
                    (probes[place][key],) = marks
                places |= dict.fromkeys(marks, (place, key))
        try:
            text = self.text(probes, options)
        except BadRowError:  # it takes no text but certain ones
            return []
        lost = [where for mark, where in places.items() if mark not in text or f"key{mark}" in text]
        return list(dict.fromkeys(lost))

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
        end = self.end_in(with_prompt, without)
        return with_prompt[end:] if end else ""

    def text(self, messages: Sequence[Message], options: Mapping[str, Any], **how: Any) -> str:
        """What the template writes; `options` are the row's own (`tools`, `enable_thinking`, …).

        Raises:
            BadRowError: it refuses the messages.
        """
        return str(self._apply(messages, options, tokenize=False, **how))

    def texts(self, chats: Sequence[Sequence[Message]], options: Mapping[str, Any], **how: Any) -> list[str]:
        """What the template writes of each of several chats, at less cost; errors as for `text`."""
        return list(self._apply(chats, options, tokenize=False, **how)) if chats else []

    def context(self, prompt: str, before: Sequence[Message], options: Mapping[str, Any], whole: Sequence[str]) -> int:
        """How much of the prompt after these messages the whole texts have to contain.

        That is all of it, or all but its generation prompt: some templates end a prompt in another way than an answer
        begins (DeepSeek's with `<think>`).
        """
        if all(text.startswith(prompt) for text in whole):
            if not self.has_marks:
                return len(prompt)
            if prompt.endswith(self.generation_prompt):  # which marks may take in
                return len(prompt) - len(self.generation_prompt)
        return self.end_in(prompt, self.text(before, options)) or len(prompt)

    def end_in(self, whole: str, beginning: str) -> int:
        """Where the beginning of a chat ends in a longer one's text; 0 if it is rendered differently there.

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

    def tail(self, prompt: str) -> list[int]:
        """Token ids of the end of a prompt, from a special token on: this splits a text for the tokenizer as well."""
        if prompt not in self._tails:
            if len(self._tails) == KNOWN_TAILS:
                self._tails.clear()
            (self._tails[prompt],) = self.encode([prompt])["input_ids"]
        return self._tails[prompt]

    def encode_chats(self, chats: Sequence[Sequence[Message]], options: Mapping[str, Any]) -> Any:
        """Token ids of chats, with their offsets, and masks of what the template marks by `{% generation %}`."""
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        return self._apply(chats, options, tokenizer_kwargs={"return_offsets_mapping": True}, **how)

    def _apply(self, messages: Sequence[Any], options: Mapping[str, Any], **how: Any) -> Any:
        if self.writes_date:
            how["strftime_now"] = self.now.strftime
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


def _kind(value: Any) -> str:
    """What decides whether a value is written: a text, or a list of what has such keys; empty where it says nothing."""
    if isinstance(value, list):
        return f"list of {[sorted(item) if isinstance(item, dict) else '' for item in value]}" if value else ""
    return "text" if isinstance(value, str) and value.strip() else ""


def _renamed(call: Any, name: str) -> Any:
    """A tool call with another name."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}
