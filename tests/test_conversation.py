import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bindllm.conversation import Conversation, Message, check_vocabulary, end_tokens, render
from bindllm.conversation import template as template_module
from bindllm.data.rows import Row, make_sample
from bindllm.errors import DecoderError, InputError
from bindllm.media import Media
from tiny import TEMPLATE, tiny_tokenizer

A, B, C = Media.image("a.png"), Media.image("b.png"), Media.image("c.png")

# As SmolLM2 does: a system message is put in front where there is none.
WITH_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama-2 and Mistral do: no header, the system text inside the first question, roles checked.
IN_BRACKETS = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}[{{ system if loop.first else '' }}{{ message['content'] }}]"
    "{% else %} {{ message['content'] | trim }}<|im_end|>{% endif %}{% endfor %}"
)
# As Qwen3 does: the last answer is rendered differently from earlier ones.
REWRITES_ANSWERS = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if loop.last and message['role'] == 'assistant' %}!{% endif %}{{ message['content'] }}",
)
REWRITES_ALL = TEMPLATE.replace("{{ message['content'] }}", "{{ loop.length }}{{ message['content'] }}")


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def talk(*turns: tuple) -> Conversation:
    """Messages by the first letter of their role: ("u", "text", Media, ...)."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return Conversation(tuple(Message(roles[role], parts) for role, *parts in turns))


def marks(rendered, tokenizer) -> tuple[str, str, str]:
    """Three lines with one letter a token: the text, x where supervised, the media index (- for -1)."""
    letters = [tokenizer.decode([token]) for token in rendered.input_ids]
    short = {"<|im_start|>": "<", "<|im_end|>": ">", "\n": "|"}
    return (
        "".join(short.get(letter, letter) for letter in letters),
        "".join("x" if flag else "." for flag in rendered.supervised),
        "".join("-" if index < 0 else str(index) for index in rendered.media_index),
    )


def test_answer_and_its_end_token_are_supervised_and_all_tokens_hear_the_image():
    tokenizer = tiny_tokenizer()
    rendered = render(talk(("u", A, "Hi"), ("a", "yo")), tokenizer)
    assert marks(rendered, tokenizer) == (
        "<user|Hi>|<assistant|yo>|",
        ".....................xxx.",
        "0000000000000000000000000",
    )


def test_two_images_route_to_their_own_turns():
    tokenizer = tiny_tokenizer()
    rendered = render(
        talk(("s", "S"), ("u", A, "1"), ("a", "x"), ("u", "2", B), ("a", "y"), ("u", "3"), ("a", "z")),
        tokenizer,
    )
    turns = (
        # The system prompt is before all media: it hears the first image.
        ("<system|S>|", "...........", "00000000000"),
        ("<user|1>|", ".........", "000000000"),
        ("<assistant|x>|", "...........xx.", "00000000000000"),
        ("<user|2>|", ".........", "111111111"),
        ("<assistant|y>|", "...........xx.", "11111111111111"),
        # A question without an image hears the nearest one before it.
        ("<user|3>|", ".........", "111111111"),
        ("<assistant|z>|", "...........xx.", "11111111111111"),
    )
    assert marks(rendered, tokenizer) == tuple("".join(part) for part in zip(*turns, strict=True))


def test_media_of_one_message_are_one_group():
    conversation = talk(("u", A, "and", B), ("a", "x"), ("u", C), ("a", "y"))
    assert conversation.media_groups == ((A, B), (C,))
    assert conversation.messages[0].text == "and"


def test_tokens_before_the_first_image_hear_it_and_a_header_hears_the_nearest_one():
    def heard(*turns, header=False):
        return render(talk(*turns), tiny_tokenizer(), add_generation_prompt=header).media_index

    assert set(heard(("s", "S"), ("u", "Hi"), ("a", "yo"))) == {-1}
    assert set(heard(("u", "1"), ("a", "x"), ("u", A), ("a", "y"))) == {0}
    assert heard(("u", A), ("a", "x"), ("u", B), header=True)[-1] == 1


def test_the_generation_prompt_ends_with_the_header_of_the_answer():
    tokenizer = tiny_tokenizer()
    rendered = render(talk(("u", A, "Hi")), tokenizer, add_generation_prompt=True)
    assert marks(rendered, tokenizer) == ("<user|Hi>|<assistant|", "." * 21, "0" * 21)
    whole = render(talk(("u", A, "Hi"), ("a", "yo")), tokenizer)
    assert whole.input_ids[:21] == rendered.input_ids


@pytest.mark.parametrize(
    ("conversation", "text"),
    [
        (talk(("u", A, "Hi"), ("a", "yo")), "<system|Be kind>|<user|Hi>|<assistant|yo>|"),
        (talk(("s", ""), ("u", A, "Hi"), ("a", "yo")), "<system|>|<user|Hi>|<assistant|yo>|"),
        (talk(("s", "Obey"), ("u", A, "Hi"), ("a", "yo")), "<system|Obey>|<user|Hi>|<assistant|yo>|"),
    ],
)
def test_system_message_is_the_default_one_or_an_empty_one_or_ours(conversation, text):
    tokenizer = tokenizer_with(WITH_DEFAULT_SYSTEM)
    rendered = render(conversation, tokenizer)
    assert marks(rendered, tokenizer) == (text, "." * (len(text) - 4) + "xxx.", "0" * len(text))


def test_template_without_headers():
    tokenizer = tokenizer_with(IN_BRACKETS)
    rendered = render(talk(("s", "S"), ("u", A, "q"), ("a", "x"), ("u", B, "r"), ("a", " y ")), tokenizer)
    assert marks(rendered, tokenizer) == ("[S|q] x>[r] y>", ".....xxx...xxx", "00000000111111")


def merging_tokenizer(merges: list[tuple[str, str]], *, use_regex: bool = False) -> PreTrainedTokenizerFast:
    """Like the tiny one, with merges across words, and offsets without leading spaces as Llama-3 gives them."""
    letters = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = [*letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


@pytest.mark.parametrize(
    ("merges", "answer"),
    [
        ([("Ċ", "y")], "you"),
        # The answer is one token together with the header's newline: all of it is learned.
        ([("Ċ", "y")], "y"),
        ([("Ċ", "Ċ")], "\n\nyou"),
        ([("t", "Ċ"), ("tĊ", "y")], "you"),
    ],
)
def test_answer_that_the_tokenizer_joins_with_its_header_is_learned_in_full(merges, answer):
    tokenizer = merging_tokenizer(merges)
    history = talk(("u", A, "Hi"), ("a", answer), ("u", "2"))
    rendered = render(talk(("u", A, "Hi"), ("a", answer), ("u", "2"), ("a", answer)), tokenizer)
    for turns, (first, stop) in zip((history.messages[:1], history.messages), rendered.answers, strict=True):
        prompt = render(Conversation(turns), tokenizer, add_generation_prompt=True)
        assert rendered.input_ids[:first] == prompt.input_ids
        assert tokenizer.decode(rendered.input_ids[first:stop]) == answer + "<|im_end|>"


@pytest.mark.parametrize("use_regex", [True, False])
@pytest.mark.parametrize("merges", [[], [("Ġ", "y"), ("Ġy", "o")]])
def test_header_that_ends_in_a_space(use_regex, merges):
    tokenizer = merging_tokenizer(merges, use_regex=use_regex)
    tokenizer.chat_template = TEMPLATE.replace("\n{{", ": {{").replace("assistant\n", "assistant: ")
    rendered = render(talk(("u", "Hi"), ("a", "yo")), tokenizer)
    (first, stop) = rendered.answers[0]
    prompt = render(talk(("u", "Hi")), tokenizer, add_generation_prompt=True)
    assert rendered.input_ids[:first] == prompt.input_ids
    assert tokenizer.convert_ids_to_tokens(rendered.input_ids[first:stop]) == ["y", "o", "<|im_end|>"]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_sentencepiece_header_that_ends_in_a_space(scheme):
    letters = ["<unk>", "<|im_start|>", "<|im_end|>", "\u2581", "\u2581y", *sorted(set("userasitn:\nHyo"))]
    backend = Tokenizer(
        models.BPE({w: i for i, w in enumerate(letters)}, [("\u2581", "y")], unk_token="<unk>", fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE.replace("\n{{", ": {{").replace("assistant\n", "assistant: ")
    conversation = talk(("u", "Hi"), ("a", "yo"))
    if scheme == "always":
        # It would write a second space before the answer.
        with pytest.raises(InputError, match="headers do not end in a space"):
            render(conversation, tokenizer)
    else:
        rendered = render(conversation, tokenizer)
        (first, stop) = rendered.answers[0]
        assert tokenizer.convert_ids_to_tokens(rendered.input_ids[first - 1 : stop]) == [
            *("\u2581", "y", "o", "<|im_end|>")
        ]


def test_token_over_a_border_of_a_question_belongs_to_its_first_character():
    tokenizer = merging_tokenizer([(">", "2")])
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n>")
    rendered = render(talk(("u", A, "Hi"), ("a", "yo"), ("u", B, "2"), ("a", "z")), tokenizer)
    assert len(rendered.media_index) == len(rendered.input_ids)
    assert set(rendered.media_index) == {0, 1}


def test_control_token_in_a_text_is_refused_or_escaped():
    tokenizer = tiny_tokenizer()
    # The second one is spelled by two parts.
    conversation = talk(("u", A, "Hi <|im_end|>", "<|im_", B, "start|>system"), ("a", "yo"))
    with pytest.raises(InputError, match=r"spells the control token .*<\|im_(end|start)\|>.*escape"):
        render(conversation, tokenizer)
    rendered = render(conversation, tokenizer, control_text="escape")
    control = [token for token in rendered.input_ids if token in tokenizer.all_special_ids]
    assert tokenizer.convert_ids_to_tokens(control) == ["<|im_start|>", "<|im_end|>"] * 2


@pytest.mark.parametrize("how", ["refuse", "escape"])
def test_control_token_in_other_letters_is_refused(how):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens({"bos_token": AddedToken("<x>", special=True, normalized=True)})
    render(talk(("u", "\uff1cy\uff1e")), tokenizer, control_text=how)
    with pytest.raises(
        InputError, match=r"spells the control token '<x>' of the decoder in other characters"
    ):
        render(talk(("u", "\uff1cx\uff1e")), tokenizer, control_text=how)


@pytest.mark.parametrize(
    ("token", "text", "escaped"), [("aa", "aaa", "a\u2060a\u2060a"), ("\u00a7", "\u00a7", None)]
)
def test_control_tokens_that_overlap_or_have_one_character(token, text, escaped):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": token})
    if escaped is None:
        # It cannot be taken apart.
        with pytest.raises(InputError, match="spells the control token .* remove it$"):
            render(talk(("u", text)), tokenizer, control_text="escape")
    else:
        rendered = render(talk(("u", text)), tokenizer, control_text="escape")
        assert tokenizer.decode(rendered.input_ids).count(escaped) == 1


def test_words_that_are_added_but_control_nothing_are_text():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    rendered = render(talk(("u", "q"), ("a", "a<think>b")), tokenizer)
    assert sum(rendered.supervised) == 4


# As gpt-oss: control tokens inside an answer, which starts after the role.
HARMONY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer", "whole"),
    [
        (HARMONY, "yo", True),
        (TEMPLATE.replace("message['content']", "message['content'] | lower"), "yo", True),
        (TEMPLATE.replace("message['content']", "message['content'] | lower"), "Yo", False),
        (TEMPLATE.replace("message['content']", "message['content'][:9]"), "a b c d e f g", False),
        (TEMPLATE.replace("message['content']", "message['content'] | escape"), "a < b", False),
        # White space around and inside an answer is up to the template.
        (
            TEMPLATE.replace("message['content']", "message['content'] | trim | replace('\n', ' ')"),
            " a\nb ",
            True,
        ),
    ],
)
def test_answer_whose_text_the_template_does_not_keep_is_not_whole(template, answer, whole):
    tokenizer = tokenizer_with(template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|channel|>", "<|message|>"]}
    )
    rendered = render(talk(("u", "q"), ("a", answer)), tokenizer)
    assert rendered.whole == [whole]
    row = Row(talk(("u", "q"), ("a", answer)), (answer,), "row 1")
    if whole:
        assert make_sample(row, tokenizer, 200).num_answers == 1
    else:
        with pytest.raises(InputError, match="only a part of it would be learned"):
            make_sample(row, tokenizer, 200)
    if template == HARMONY:
        learned = tokenizer.decode(rendered.input_ids[slice(*rendered.answers[0])])
        assert learned == "<|channel|>final<|message|>yo<|im_end|>"


# As Qwen3: the last answer follows an empty thought, unless the model may think.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_decoder_that_can_think_learns_the_answer_without_a_thought(turns):
    tokenizer = tokenizer_with(THINKS)
    talked = [("u", "q"), ("a", "yo")] * turns
    rendered = render(talk(*talked), tokenizer)
    learned = [tokenizer.decode(rendered.input_ids[first:stop]) for first, stop in rendered.answers]
    assert learned == ["yo<|im_end|>"] * turns
    prompt = render(talk(*talked[:-1]), tokenizer, add_generation_prompt=True)
    assert prompt.input_ids == rendered.input_ids[: rendered.answers[-1][0]]


# As Qwen3.5: answers after the last question follow a thought, earlier ones do not.
THINKS_LATE = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As Gemma 4: no answer of the conversation has the empty thought of its prompt, and thinking adds a system message.
THINKS_NEVER = (
    "{% if enable_thinking | default(false) %}<|im_start|>system\n<|think|><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking | default(false) %}<|message|>thought\n<|channel|>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("template", [THINKS_LATE, THINKS_NEVER])
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_last_answer_follows_its_prompt_and_earlier_ones_their_plain_header(template, turns):
    tokenizer = tokenizer_with(template)
    talked = [("u", "q"), ("a", "<yo")] * turns
    rendered = render(talk(*talked), tokenizer)
    learned = [tokenizer.decode(rendered.input_ids[first:stop]) for first, stop in rendered.answers]
    assert learned == ["<yo<|im_end|>"] * turns
    prompt = render(talk(*talked[:-1]), tokenizer, add_generation_prompt=True)
    assert prompt.input_ids == rendered.input_ids[: rendered.answers[-1][0]]
    for first, _ in rendered.answers[:-1]:
        assert tokenizer.decode(rendered.input_ids[:first]).endswith("<|im_start|>assistant\n")


def test_several_named_templates():
    tokenizer = tokenizer_with({"default": TEMPLATE, "tool_use": HARMONY})
    assert render(talk(("u", "q"), ("a", "yo")), tokenizer).whole == [True]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TEMPLATE, ["<|im_end|>"]),
        (IN_BRACKETS, ["<|im_end|>"]),
        # As gpt-oss, the last answer ends differently; as some, only one exchange is possible.
        (
            TEMPLATE.replace(
                "<|im_end|>", "{{ '<|endoftext|>' if loop.index == 2 and not loop.last else '<|im_end|>' }}"
            ),
            None,
        ),
        ("{% if messages|length > 2 %}{{ raise_exception('one') }}{% endif %}" + TEMPLATE, ["<|im_end|>"]),
    ],
)
def test_end_tokens_are_those_of_the_template(template, ends):
    tokenizer = tokenizer_with(template)
    tokenizer.eos_token = "<|endoftext|>"
    found = tokenizer.convert_ids_to_tokens(end_tokens(tokenizer))
    assert found == (ends or ["<|im_end|>", "<|endoftext|>"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (7, "a text or a list of parts, not 7"),
        ([None], "a text or a Media, not None"),
        (["a", 1.5], "a text or a Media, not 1.5"),
        ("half \ud83d of a pair", "not valid Unicode"),
    ],
)
def test_content_of_another_kind_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        Message("user", content)


def test_equal_texts_in_two_unicode_forms_have_equal_tokens():
    def tokens(word):
        turns = Message("user", ["a ", word]), Message("assistant", word)
        return render(Conversation(turns), tiny_tokenizer()).input_ids

    thoughts = Message("assistant", "yes", {"reasoning_content": "hm, cafe\u0301"})
    assert thoughts.fields["reasoning_content"] == "hm, caf\u00e9"
    assert tokens("cafe\u0301") == tokens("caf\u00e9")


def test_unknown_role_gets_the_closest_known_one():
    with pytest.raises(InputError, match="Did you mean 'user'"):
        Message("users", "Hi")


def test_conversations_that_cannot_be_rendered():
    tokenizer = tiny_tokenizer()
    for messages in ((), None, Message("user", "Hi")):
        with pytest.raises(InputError, match="a list of at least one Message, not"):
            Conversation(messages)
    with pytest.raises(InputError, match="starts with an answer"):
        render(talk(("a", "yo")), tokenizer)
    with pytest.raises(InputError, match="already an answer"):
        render(talk(("u", "Hi"), ("a", "yo")), tokenizer, add_generation_prompt=True)
    with pytest.raises(InputError, match=r"refuses messages of the roles user, user: roles must alternate"):
        render(talk(("u", "1"), ("u", "2")), tokenizer_with(IN_BRACKETS))


def test_templates_that_cannot_be_used_say_why():
    conversation = talk(("u", A), ("u", B), ("a", "y"))
    with pytest.raises(DecoderError, match=r"no chat template.*chat_template\.jinja.*template: alpaca"):
        render(conversation, tokenizer_with(None))
    with pytest.raises(DecoderError, match="renders the messages before message 3 differently"):
        render(conversation, tokenizer_with(REWRITES_ALL))
    with pytest.raises(DecoderError, match="without a control token"):
        render(conversation, tokenizer_with("{% for m in messages %}{{ m['content'] }}|{% endfor %}"))


def test_template_that_rewrites_earlier_answers():
    tokenizer = tokenizer_with(REWRITES_ANSWERS)
    rendered = render(talk(("u", A, "1"), ("a", "x"), ("u", B, "2"), ("a", "y")), tokenizer)
    # The second image starts after the end token of the first answer.
    assert marks(rendered, tokenizer) == (
        "<user|1>|<assistant|x>|<user|2>|<assistant|!y>|",
        "....................xx.....................xxx.",
        "0000000000000000000000" + "1" * 25,
    )


def test_tokens_beyond_the_embedding_are_named_where_they_can_occur():
    tokenizer = tiny_tokenizer()
    check_vocabulary(tokenizer, 259)
    with pytest.raises(
        DecoderError, match=r"256 token embeddings, .* 3 tokens with an id beyond them: .* \(256\)"
    ):
        check_vocabulary(tokenizer, 256)
    # As Gemma 3 does: a control token that no text spells and no template writes.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(tokenizer, 259)
    tokenizer.pad_token = "<image>"
    with pytest.raises(DecoderError, match=r"'<image>' \(259\)\. .*remove pad_token"):
        check_vocabulary(tokenizer, 259)
    # A word that texts do spell.
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    with pytest.raises(DecoderError, match=r"1 tokens with an id beyond them: '<think>'"):
        check_vocabulary(tokenizer, 259)


@pytest.mark.parametrize("template", [TEMPLATE, WITH_DEFAULT_SYSTEM, IN_BRACKETS, REWRITES_ANSWERS])
@pytest.mark.parametrize("asks_again", [False, True])
def test_many_answers_are_found_where_rendering_each_prefix_finds_them(monkeypatch, template, asks_again):
    # Texts that look like headers, are empty, or repeat.
    texts = ["assistant\n", "user", "assistant\n", "|>assistant\n", "a", "\nassistant\n", "a", "a"]
    turns = [(role, text) for text, role in zip(texts, "uauauaua", strict=True)]
    conversation = talk(("s", "S"), *turns, *[("u", "assistant\n")] * asks_again)
    tokenizer, calls = tokenizer_with(template), []
    found = render(conversation, tokenizer, add_generation_prompt=asks_again)
    with monkeypatch.context() as patch:
        patch.setattr(template_module.re, "finditer", lambda *_: calls.append(1) or [])
        rendered = render(conversation, tokenizer, add_generation_prompt=asks_again)
    # Without a header there is nothing to look for.
    assert len(calls) == (template != IN_BRACKETS)
    assert found == rendered
    assert len(found.answers) == 4


def test_the_time_for_many_answers_does_not_grow_with_their_square(monkeypatch):
    tokenizer, calls = tiny_tokenizer(), []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *args, **options: calls.append(1) or apply(*args, **options)
    )
    render(talk(*[("u", "q"), ("a", "x")] * 20), tokenizer)
    assert len(calls) == 4
