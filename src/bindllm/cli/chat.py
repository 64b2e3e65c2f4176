"""``bindllm chat``: a conversation with a checkpoint in the terminal, with media of every modality that it serves."""

from __future__ import annotations

import glob
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bindllm.cli import print_error
from bindllm.cli.generate import (
    ModelCacheOptions,
    ModelOptions,
    SamplingOptions,
    ShotOptions,
    load_with_cache,
    print_neighbors,
)
from bindllm.cli.options import named_media
from bindllm.conversation import Conversation, Message
from bindllm.errors import BindLLMError, UsageError, did_you_mean, printable, printable_lines
from bindllm.media import Media

if TYPE_CHECKING:
    from bindllm.model.bindllm import BindLLM

COMMANDS = {
    "system": "TEXT: say how the model should answer; without TEXT, no longer",
    "shots": "FILE: put worked examples of a table before the question, as --shots; without FILE, no longer",
    "clear": "forget the conversation and the attached media; /system and /shots stay",
    "retry": "ask the last message again; another answer needs --temperature",
    "help": "print this list",
    "quit": "end the chat, as does the end of the input (Ctrl-D)",
}


def chat(
    checkpoint: str,
    *,
    examples: ShotOptions = ShotOptions(),
    decoding: SamplingOptions = SamplingOptions(),
    model: ModelOptions = ModelOptions(),
    cache: ModelCacheOptions = ModelCacheOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Talk with a checkpoint about images, audio and other media.

    Attach media with /image FILE, /audio FILE, ..., then type the question.
    /help lists all commands. Ctrl-C stops an answer.

    Args:
        checkpoint: folder that bindllm fit wrote

    Example:
        bindllm chat checkpoints/scenes --temperature 0.7
    """
    # A table that cannot be read is an error before the model is loaded.
    if examples.shots is not None:
        examples.read("?")
    loaded = load_with_cache(checkpoint, model, cache, overrides)

    # Imported late, so that --help and wrong options answer at once.
    import torch

    # Only sampling uses it; a second answer to a message continues the sequence.
    torch.manual_seed(decoding.seed)
    talk = Chat(loaded, decoding.given, examples, seed=decoding.seed, show_neighbors=cache.show_neighbors)
    if sys.stdin.isatty():
        _complete_with_tab(talk)
        print(f"{printable(checkpoint)} serves {', '.join(talk.modalities)}. /help lists the commands.")
    talk.run()
    return 0


class Chat:
    """The conversation so far, and the media that wait for the next message.

    Args:
        options: options of each answer, as for `BindLLM.stream`.
        examples: a table of worked examples, if there is one, and how those of a question are chosen.
        show_neighbors: after an answer, print the images that the model's cache retrieved for the media of the message.

    Attributes:
        modalities: those that the encoders of the model serve; each has a command of its name.
    """

    def __init__(
        self,
        model: BindLLM,
        options: dict[str, Any],
        examples: ShotOptions = ShotOptions(),
        *,
        seed: int = 0,
        show_neighbors: bool = False,
    ) -> None:
        from bindllm.embeddings.embedder import RecentEmbeddings

        self.modalities = sorted({name for encoder in model.encoders for name in encoder.modalities})
        self._model, self._options, self._show_neighbors = model, options, show_neighbors
        self._examples, self._seed, self._system = examples, seed, ""
        # By content: media of earlier messages, and of the same shots, are not encoded again.
        self._recent = RecentEmbeddings()
        # Only messages with an answer; the last one that was asked may have none.
        self._messages: list[Message] = []
        self._attached: list[Media] = []
        self._asked: Message | None = None

    def run(self) -> None:
        """Read and carry out lines until /quit or the end of the input."""
        while True:
            try:
                line = input(self._prompt() if sys.stdin.isatty() else "")
            except EOFError:
                # The prompt is still on this line.
                print(end="\n" if sys.stdin.isatty() else "")
                return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D ends the chat")
                continue
            try:
                if line.strip() == "/quit":
                    return
                self.take(line)
            except KeyboardInterrupt:
                print("\nstopped")
            # An encoder of the user may raise anything, and the conversation must survive it.
            except Exception as error:
                if os.environ.get("BINDLLM_DEBUG"):
                    traceback.print_exc()
                is_known = isinstance(error, BindLLMError | OSError)
                print_error("error" if is_known else type(error).__name__, error)

    def take(self, line: str) -> None:
        """Carry out one line: a command, or a text that the model answers.

        Raises:
            UsageError: an unknown command, or one without its file.
            BindLLMError: media or a message that the model cannot use; the conversation is as before.
        """
        if not line.startswith("/"):
            if text := line.strip():
                message, self._attached = Message("user", [*self._attached, text]), []
                self._ask(message, self._messages)
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name in self.modalities:
            self._attach(name, rest.strip())
        elif name == "system":
            self._system = rest.strip()
            print("the model is told this before the conversation" if self._system else "no system text")
        elif name == "shots":
            self._take_shots(rest.strip())
        elif name == "clear":
            self._messages, self._attached, self._asked = [], [], None
        elif name == "retry":
            self._retry()
        elif name == "help":
            print(self._help())
        else:
            hint = did_you_mean(name, [*self.modalities, *COMMANDS])
            raise UsageError(
                f"unknown command /{name}. {hint} A text that starts with / has a space before it."
            )

    def complete(self, line: str) -> list[str]:
        """Return the lines that a line can become: commands, or files after the command of a modality."""
        command, space, path = line.partition(" ")
        if not space:
            return [f"/{name} " for name in (*self.modalities, *COMMANDS) if f"/{name}".startswith(line)]
        if command[1:] not in (*self.modalities, "shots") or command == "/text":
            return []
        found = sorted(glob.glob(glob.escape(os.path.expanduser(path)) + "*"))
        # A name with escape sequences would reach the terminal as it is.
        names = [name + os.sep if os.path.isdir(name) else name for name in found if name.isprintable()]
        return [f"{command} {name}" for name in names]

    def _prompt(self) -> str:
        attached = ", ".join(item.modality for item in self._attached)
        return f"[{attached}] > " if attached else "> "

    def _help(self) -> str:
        uses = {f"/{name} {'WORDS' if name == 'text' else 'FILE'}": name for name in self.modalities}
        lines = {use: f"attach {name} media to the next message" for use, name in uses.items()}
        for name, purpose in COMMANDS.items():
            argument, colon, rest = purpose.partition(": ")
            lines |= {f"/{name} {argument}": rest} if colon else {f"/{name}": purpose}
        width = max(map(len, lines))
        return "\n".join(
            [
                *(f"  {use:<{width}}  {purpose}" for use, purpose in lines.items()),
                "Media of one message are fused into one embedding. Ctrl-C stops an answer.",
            ]
        )

    def _attach(self, modality: str, rest: str) -> None:
        """Attach media to the next message; files are opened here, so that a bad one is reported at once."""
        if not rest:
            raise UsageError(f"/{modality} needs {'words' if modality == 'text' else 'a file'} after it")
        media = [named_media(modality, source) for source in _sources(modality, rest)]
        try:
            self._model.encode(media, cache=False, recent=self._recent)
        except Exception as error:
            error.add_note(f"Nothing was attached. /{modality} takes files; the question is the next line.")
            raise
        self._attached += media
        print(f"attached: {', '.join(f'{modality} {printable(item.name)}' for item in media)}")

    def _take_shots(self, rest: str) -> None:
        """Take worked examples from another table, or from none; one that cannot be read changes nothing."""
        files = _sources("file", rest) if rest else [None]
        if len(files) > 1:
            raise UsageError(f"/shots takes one table, not {len(files)} files")
        examples = replace(self._examples, shots=files[0])
        if files[0] is not None:
            # Rows of captions have the question of the conversation, which is not known yet.
            count = len(examples.read("?"))
            name = printable(files[0])
            print(f"worked examples in {name}: {count}; up to {examples.num_shots} precede a question")
        else:
            print("no worked examples")
        self._examples = examples

    def _shots(self, message: Message) -> dict[str, Any]:
        """Return the option of `BindLLM.stream` for the worked examples of a question."""
        if self._examples.shots is None:
            return {}
        table = self._examples.read(message.text)
        chosen = self._examples.choose(table, self._model, message.text, message.media, seed=self._seed)
        return {"shots": chosen}

    def _retry(self) -> None:
        if self._asked is None:
            raise UsageError("/retry has no message to ask again; type one")
        # The last two are this message and the answer to replace, unless it has none.
        answered = self._asked in self._messages[-2:]
        self._ask(self._asked, self._messages[:-2] if answered else self._messages)

    def _ask(self, message: Message, before: list[Message]) -> None:
        """Print the answer to a message while it is generated, and keep both after the messages before."""
        self._asked, answer = message, ""
        system = [Message("system", self._system)] if self._system else []
        stream = self._model.stream(
            Conversation((*system, *before, message)),
            recent=self._recent,
            **self._options,
            **self._shots(message),
        )
        try:
            # Closed at once if printing is interrupted: else the model would finish the answer in its thread.
            with closing(stream) as pieces:
                for piece in pieces:
                    answer += piece
                    # A model may print any byte.
                    print(printable_lines(piece), end="", flush=True)
            print()
        except KeyboardInterrupt:
            print("\nstopped")
        if not answer.strip():
            print("no answer: the conversation is as before; /retry asks again", file=sys.stderr)
            return
        self._messages = [*before, message, Message("assistant", answer.strip())]
        if self._show_neighbors and message.media:
            print_neighbors(self._model, message.media, recent=self._recent)


def _sources(modality: str, rest: str) -> list[str]:
    """Return the words of a text, or the files that a line names: one, or several with quotes as in a shell."""
    if modality == "text":
        return [rest]
    # A whole path first: it may have spaces, or backslashes on Windows.
    if os.path.exists(path := os.path.expanduser(rest)):
        return [path]
    try:
        return [os.path.expanduser(word) for word in shlex.split(rest)]
    except ValueError as error:
        raise UsageError(f"{rest}: {error}; quote a file name as in a shell") from error


def _complete_with_tab(talk: Chat) -> None:
    """Let Tab complete lines, and the arrow keys recall them, where Python has readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(line: str, state: int) -> str | None:
        found = talk.complete(line)
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    # Whole lines: file names may have spaces.
    readline.set_completer_delims("")
    # macOS has another library under the same name.
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
