"""Real chat templates with small tokenizers of the same make as the models'."""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from unstilted.errors import UserError
from unstilted.lm.chat import ChatTokens
from unstilted.records import Message, Pair

TEMPLATES = Path(__file__).parent / "templates"
TEXT = [
    "hey there, over there, how was it? it was fine, there. why do cats knead? they do it because they did it when they were small.",
    "be brief. say hey to the user, and to the assistant. hey hey. 12 of 345 cats. system user assistant model [INST] [/INST] SYS",
] * 8
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3, Qwen and Mistral-Nemo cut text before merging, but for English contractions."""
PIECES = r"▁+[^▁\n]*|\n+|[^▁\n]+"


def system(text: str) -> Message:
    return Message(role="system", content=text)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


# Tokenizers


def byte_level(special: tuple[str, ...], *, bos: str = "", nfc: bool = False) -> Tokenizer:
    """As Llama 3 (which writes BOS itself), Mistral-Nemo, and with NFC Qwen."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    cut = [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    newlines = ["hey.\n\nhey\n\n\nhey\n"] * 8
    trainer = trainers.BpeTrainer(vocab_size=460, initial_alphabet=alphabet, special_tokens=as_special(special), show_progress=False)
    tokenizer.train_from_iterator(TEXT + newlines, trainer)
    return with_bos(tokenizer, bos)


def sentencepiece(special: tuple[str, ...], *, prefix_space: str, bos: str = "", newlines: bool = False) -> Tokenizer:
    """As Llama 2 and Mistral 7B (prefix_space "first", or "everywhere" as their older files do it) and Gemma ("never", with newlines)."""
    vocab, merges = trained_pieces(newlines)
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *vocab]
    numbers = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        back.append(decoders.Strip(" ", 1, 0))
    elif prefix_space == "everywhere":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.add_special_tokens(as_special(special))
    return with_bos(tokenizer, bos)


@cache
def trained_pieces(newlines: bool) -> tuple[list[str], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    text = [*TEXT, *["hey\n\nhey\n\n\nhey"] * (8 * newlines)]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    return list(model["vocab"]), [(first, second) for first, second in model["merges"]]


def as_special(tokens: tuple[str, ...]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """Let it write `bos` by itself when it is asked for special tokens."""
    if bos:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return tokenizer


def templated(tokenizer: Tokenizer, template: str, name: str = "model", **named: str) -> ChatTokens:
    """template: a file of `templates/`, or the template's text."""
    text = template if "{" in template else (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=text, clean_up_tokenization_spaces=False, **named)
    return ChatTokens(wrapped, name)


LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
MISTRAL = ("<unk>", "<s>", "</s>")
NEMO = (*MISTRAL, "[INST]", "[/INST]")
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

FAMILIES: dict[str, Callable[[], ChatTokens]] = {
    "llama 3": lambda: templated(byte_level(LLAMA_3, bos=LLAMA_3[0]), "llama3", bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"),
    "qwen 2.5": lambda: templated(byte_level(QWEN, nfc=True), "qwen2_5", eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "qwen 2.5 base": lambda: templated(byte_level(QWEN, nfc=True), "qwen2_5", eos_token="<|endoftext|>"),
    "chatml": lambda: templated(
        sentencepiece((*MISTRAL, *QWEN[1:]), prefix_space="first", bos="<s>"), "chatml", bos_token="<s>", eos_token="<|im_end|>"
    ),
    "chatml, older": lambda: templated(
        sentencepiece((*MISTRAL, *QWEN[1:]), prefix_space="everywhere", bos="<s>"), "chatml", bos_token="<s>", eos_token="<|im_end|>"
    ),
    "chatml on gemma": lambda: templated(
        sentencepiece((*GEMMA, *QWEN[1:]), prefix_space="never", newlines=True), "chatml", bos_token="<bos>", eos_token="<eos>"
    ),
    "gemma": lambda: templated(
        sentencepiece(GEMMA, prefix_space="never", bos="<bos>", newlines=True), "gemma", bos_token="<bos>", eos_token="<eos>"
    ),
    "mistral 7b": lambda: templated(
        sentencepiece(MISTRAL, prefix_space="first", bos="<s>"), "mistral_v1", bos_token="<s>", eos_token="</s>"
    ),
    "mistral 7b, older": lambda: templated(
        sentencepiece(MISTRAL, prefix_space="everywhere", bos="<s>"), "mistral_v1", bos_token="<s>", eos_token="</s>"
    ),
    "mistral nemo": lambda: templated(byte_level(NEMO, bos="<s>"), "mistral_nemo", bos_token="<s>", eos_token="</s>"),
    "zephyr": lambda: templated(sentencepiece(MISTRAL, prefix_space="first", bos="<s>"), ZEPHYR, bos_token="<s>", eos_token="</s>"),
    "vicuna": lambda: templated(sentencepiece(MISTRAL, prefix_space="first", bos="<s>"), VICUNA, bos_token="<s>", eos_token="</s>"),
    "vicuna, older": lambda: templated(
        sentencepiece(MISTRAL, prefix_space="everywhere", bos="<s>"), VICUNA, bos_token="<s>", eos_token="</s>"
    ),
}


@cache
def family(name: str) -> ChatTokens:
    return FAMILIES[name]()


# Goldens


@dataclass(frozen=True)
class Golden:
    """What the model reads and what it is trained on, as text and around the boundary as tokens."""

    family: str
    messages: list[Message]
    prompt: str
    response: str
    boundary: tuple[str, str]
    """The prompt's last and the response's first token."""
    end_of_turn: str
    n_bos: int
    answer: str = "hey there"


ASKED, TALKED = [user("why")], [user("hey"), assistant("hey hey"), user("why")]
TOLD = [system("be brief."), *TALKED]
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
CHATML_TALKED = (
    "<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\nhey hey<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
)
GOLDENS = [
    Golden(
        "llama 3",
        ASKED,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nwhy<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "hey there<|eot_id|>",
        ("ĊĊ", "hey"),
        "<|eot_id|>",
        1,
    ),
    Golden(
        "llama 3",
        TOLD,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhey<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nhey hey<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhy<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "hey<|eot_id|>",
        ("ĊĊ", "hey"),
        "<|eot_id|>",
        1,
        answer="\n\n hey \n",  # the template trims it, so nothing joins the header's newlines
    ),
    Golden(
        "qwen 2.5",
        ASKED,
        QWEN_SYSTEM + "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n",
        "hey there<|im_end|>",
        ("Ċ", "hey"),
        "<|im_end|>",
        0,
    ),
    Golden(
        "qwen 2.5 base",
        TOLD,
        "<|im_start|>system\nbe brief.<|im_end|>\n" + CHATML_TALKED,
        "hey there<|im_end|>",
        ("Ċ", "hey"),
        "<|im_end|>",
        0,
    ),
    Golden("chatml", TALKED, CHATML_TALKED, "hey there<|im_end|>", ("<0x0A>", "hey"), "<|im_end|>", 0),
    Golden("chatml on gemma", TALKED, CHATML_TALKED, "hey there<|im_end|>", ("\n", "hey"), "<|im_end|>", 0),
    Golden(
        "gemma",
        TALKED,
        "<bos><start_of_turn>user\nhey<end_of_turn>\n<start_of_turn>model\nhey hey<end_of_turn>\n"
        "<start_of_turn>user\nwhy<end_of_turn>\n<start_of_turn>model\n",
        "hey there<end_of_turn>",
        ("\n", "hey"),
        "<end_of_turn>",
        1,
    ),
    Golden("mistral 7b", ASKED, "<s> [INST] why [/INST]", " hey there</s>", ("▁[/INST]", "▁hey"), "</s>", 1),
    Golden("mistral 7b", ASKED, "<s> [INST] why [/INST]", "  hey there</s>", ("▁[/INST]", "▁"), "</s>", 1, answer=" hey there"),
    Golden(
        "mistral 7b",
        TOLD,
        "<s> [INST] be brief.\n\nhey [/INST] hey hey</s> [INST] why [/INST]",
        " hey there</s>",
        ("▁[/INST]", "▁hey"),
        "</s>",
        1,
    ),
    Golden("mistral nemo", ASKED, "<s>[INST]why[/INST]", "hey there</s>", ("[/INST]", "hey"), "</s>", 1),
    Golden("mistral nemo", ASKED, "<s>[INST]why[/INST]", " hey there</s>", ("[/INST]", "Ġhey"), "</s>", 1, answer=" hey there"),
    Golden("mistral nemo", TALKED, "<s>[INST]hey[/INST]hey hey</s>[INST]why[/INST]", "hey there</s>", ("[/INST]", "hey"), "</s>", 1),
    Golden("zephyr", ASKED, "<|user|>\nwhy</s>\n<|assistant|>\n", "hey there</s>", ("<0x0A>", "hey"), "</s>", 0),
]


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: f"{golden.family}, {len(golden.messages)} messages")
def test_a_template_is_cut_where_the_answer_begins_and_after_its_end_of_turn(golden: Golden) -> None:
    chat = family(golden.family)
    prompt, response = chat.prompt(golden.messages), chat.response(golden.messages, assistant(golden.answer))
    tokens = chat.tokenizer.convert_ids_to_tokens
    assert chat.tokenizer.decode(prompt) == golden.prompt
    assert chat.tokenizer.decode(prompt + response) == golden.prompt + golden.response
    assert (tokens(prompt[-1]), tokens(response[0])) == golden.boundary
    assert tokens(response[-1]) == tokens(chat.end_of_turn) == golden.end_of_turn
    assert response.count(chat.end_of_turn) == 1
    assert [*prompt, *response].count(chat.tokenizer.bos_token_id) == golden.n_bos


@pytest.mark.parametrize("name", ["llama 3", "gemma", "mistral 7b", "mistral nemo"])
def test_a_tokenizer_that_writes_bos_itself_doesnt_double_the_templates(name: str) -> None:
    chat = family(name)
    bos = chat.tokenizer.bos_token_id
    assert chat.tokenizer("hey")["input_ids"][0] == bos
    assert chat.prompt(TALKED)[0] == bos
    assert bos not in chat.prompt(TALKED)[1:]
    assert bos not in chat.response(TALKED, assistant("hey"))


@pytest.mark.parametrize("name", ["llama 3", "qwen 2.5 base", "gemma", "chatml on gemma"])
def test_the_end_of_turn_is_the_templates_even_where_eos_token_is_another(name: str) -> None:
    chat = family(name)
    assert chat.end_of_turn != chat.tokenizer.eos_token_id
    assert chat.response(ASKED, assistant("hey"))[-1] == chat.end_of_turn


def test_of_several_special_tokens_after_an_answer_the_first_ends_it() -> None:
    phi = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + ' <|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    )
    special = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>")
    phi_chat = templated(byte_level(special), phi, eos_token="<|endoftext|>")
    assert phi_chat.tokenizer.decode(phi_chat.response(ASKED, assistant("hey"))) == "hey <|end|>"


# The boundary


@pytest.mark.parametrize(
    ("name", "answer", "boundary"),
    [
        ("qwen 2.5", "\nhey", ["Ċ", "Ċ", "hey"]),
        ("chatml on gemma", "\nhey", ["\n", "\n", "hey"]),
        ("mistral nemo", "\n\nhey", ["[/INST]", "ĊĊ", "hey"]),  # nothing to join
        ("vicuna", "hey", ["▁", "hey"]),
        ("vicuna, older", "hey", ["▁", "hey"]),
        ("vicuna, older", " hey", ["▁", "▁hey"]),
    ],
)
def test_a_token_that_would_reach_over_the_boundary_is_cut_there(name: str, answer: str, boundary: list[str]) -> None:
    chat = family(name)
    prompt, response = chat.prompt(ASKED), chat.response(ASKED, assistant(answer))
    assert chat.tokenizer.convert_ids_to_tokens([prompt[-1], *response[:-1]]) == boundary


def test_an_answer_in_its_place_has_no_space_before_it_that_its_text_alone_would_get() -> None:
    for name in ("chatml", "chatml, older", "zephyr"):
        chat = family(name)
        alone = chat.tokenizer("hey there", add_special_tokens=False)["input_ids"]
        assert chat.tokenizer.convert_ids_to_tokens(alone)[0] == "▁hey"
        assert chat.tokenizer.convert_ids_to_tokens(chat.response(ASKED, assistant("hey there")))[0] == "hey"


texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=4),
        st.sampled_from([" ", "\n", "\n\n", "hey", "é", "e\u0301", "12345"]),
    ),
    max_size=5,
).map("".join)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(said=st.lists(texts, min_size=1, max_size=4).filter(lambda said: len(said) % 2), answers=st.tuples(texts, texts))
def test_any_conversation_comes_back_as_its_template_wrote_it(name: str, said: list[str], answers: tuple[str, str]) -> None:
    chat = family(name)
    tokenizer = chat.tokenizer
    assume(not any(token in text for token in chat.tokenizer.all_special_tokens for text in [*said, *answers]))
    messages = [assistant(text) if index % 2 else user(text) for index, text in enumerate(said)]
    pair = chat.pair(Pair(id="p", prompt=tuple(messages), chosen=(assistant(answers[0]),), rejected=(assistant(answers[1]),)))
    rows = [message.model_dump() for message in messages]
    assert pair.prompt == chat.prompt(messages) == tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]
    end = tokenizer.convert_ids_to_tokens(chat.end_of_turn)
    for response, answer in zip((pair.chosen, pair.rejected), answers, strict=True):
        assert response == chat.response(messages, assistant(answer))
        assert response.index(chat.end_of_turn) == len(response) - 1
        written = tokenizer.apply_chat_template([*rows, {"role": "assistant", "content": answer}], tokenize=False)
        written = written[: written.rindex(end) + len(end)]
        joint = tokenizer(written, add_special_tokens=False)["input_ids"]
        if joint[: len(pair.prompt)] == pair.prompt:
            assert pair.prompt + response == joint
        if "older" in name:  # these write a space after every special token, wherever it stands
            written = tokenizer.decode(joint)
        decoded = tokenizer.decode(pair.prompt + response)
        assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", written)


# What is refused


def test_a_conversation_that_the_template_doesnt_take_is_refused_with_its_reason() -> None:
    do = r"Put a system message's text into the first user message, and let user and assistant take turns, the user first\."
    with pytest.raises(
        UserError, match=rf"^model: its chat template refuses a conversation of system, user: System role not supported\. {do}$"
    ):
        family("gemma").prompt([system("be brief."), user("hey")])
    with pytest.raises(UserError, match=r"refuses a conversation of user, user: .* must alternate user/assistant/user/assistant/\. Put"):
        family("mistral 7b").prompt([user("hey"), user("why")])


def test_a_system_message_that_goes_once_the_conversation_is_answered_is_refused_with_the_way_out() -> None:
    chat = family("mistral nemo")
    told = [system("be brief."), user("why")]
    assert chat.tokenizer.decode(chat.prompt(told)) == "<s>[INST]be brief.\n\nwhy[/INST]"
    with pytest.raises(
        UserError, match=r"so prompt and response can't be told apart\..*\(Mistral-Nemo\), put its text into the user's message\.$"
    ):
        chat.response(told, assistant("hey"))


def test_a_system_prompt_goes_into_the_users_words_where_the_template_takes_none() -> None:
    asked = [system("be loud."), user("hey")]
    assert family("llama 3").under_system("be brief.", asked) == [system("be brief."), user("hey")]
    assert family("gemma").under_system("be brief.", asked) == [user("be brief.\n\nhey")]


def test_a_template_that_drops_the_system_message_is_refused() -> None:
    only_users = "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    deaf = templated(byte_level(QWEN), only_users, eos_token="<|im_end|>")
    assert deaf.tokenizer.decode(deaf.prompt([user("hey")])) == "<|im_start|>hey<|im_end|>"
    with pytest.raises(UserError, match=r"^model: its chat template leaves out this system message: 'be brief\.'\. Use a model"):
        deaf.prompt([system("be brief."), user("hey")])


def test_an_answer_that_the_template_shortens_is_refused() -> None:
    thinks = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    thinker = templated(byte_level(QWEN), thinks, eos_token="<|im_end|>")
    assert thinker.tokenizer.decode(thinker.response(ASKED, assistant("hey"))) == "hey<|im_end|>"
    with pytest.raises(UserError, match=r"^model: its chat template leaves out a part of this answer: 'so</think>hey'"):
        thinker.response(ASKED, assistant("so</think>hey"))


def test_a_template_without_a_generation_prompt_is_refused() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    with pytest.raises(UserError, match=r"has no generation prompt, so the model would have to write '<\|im_start\|>assistant\\n' itself"):
        templated(byte_level(QWEN), template, eos_token="<|im_end|>").response(ASKED, assistant("hey"))


def test_an_end_that_isnt_one_special_token_is_refused() -> None:
    """ChatML put on a tokenizer that doesn't know its tokens."""
    with pytest.raises(UserError, match=r"^model: its chat template doesn't end an answer with a special token but with '<\|im_end\|>\\n'"):
        templated(byte_level(("<|endoftext|>",)), "chatml", eos_token="<|endoftext|>").response(ASKED, assistant("hey"))


def test_a_template_that_ends_only_some_answers_is_refused_at_the_others() -> None:
    template = (
        "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content }}{% endfor %}"
        "{{ eos_token if messages | length == 2 }}"
    )
    forgetful = templated(byte_level(NEMO), template, eos_token="</s>")
    assert forgetful.tokenizer.decode(forgetful.response(ASKED, assistant("hey"))) == "hey</s>"
    with pytest.raises(
        UserError, match=r"^model: its tokenizer doesn't read '</s>' exactly once.* Let the template write that token after every"
    ):
        forgetful.response(TALKED, assistant("hey"))


def test_an_end_of_turn_that_the_tokenizer_reads_as_text_after_a_letter_is_refused() -> None:
    tokenizer = byte_level(("<|endoftext|>",))
    tokenizer.add_special_tokens([AddedToken("end", special=True, single_word=True)])
    template = "{% for m in messages %}{{ m.content + ('end' if m.role == 'assistant' else ' ') }}{% endfor %}"
    glued = templated(tokenizer, template, eos_token="<|endoftext|>")
    assert glued.response(ASKED, assistant("hey."))[-1] == glued.end_of_turn
    with pytest.raises(UserError, match=r"^model: its tokenizer doesn't read 'end' exactly once, at the end of this answer: 'hey'"):
        glued.response(ASKED, assistant("hey"))


def test_a_turn_forged_by_letters_that_the_tokenizer_rewrites_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate("hey<> \n")}, merges=[]))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True, normalized=True)])
    template = "{% for m in messages %}{{ m.content + ('<end>' if m.role == 'assistant' else '\n') }}{% endfor %}"
    forgeable = templated(tokenizer, template, eos_token="<end>")
    with pytest.raises(UserError, match=r"doesn't read '<end>' exactly once"):
        forgeable.response(ASKED, assistant("hey\uff1cend\uff1ehey"))


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|start_header_id|>", "<|end_of_text|>"])
def test_special_tokens_without_a_role_of_their_own_are_refused_in_messages_too(token: str) -> None:
    for messages, answer in [([user(f"hey{token}")], "hey"), (ASKED, f"hey{token}")]:
        with pytest.raises(UserError, match=r"a message holds the model's special token '<\|"):
            family("llama 3").response(messages, assistant(answer))


class Pairwise(PreTrainedTokenizer):
    """A tokenizer without tokenizer.json, whose tokens are two letters long."""

    def __init__(self, **named: Any) -> None:
        self.numbers: dict[str, int] = {}
        super().__init__(**named)

    @property
    def vocab_size(self) -> int:
        return len(self.numbers)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.numbers)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [text[start : start + 2] for start in range(0, len(text), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.numbers.setdefault(token, len(self.numbers) + 100)


def test_a_tokenizer_that_cant_be_cut_at_the_boundary_is_refused_only_where_it_must_be() -> None:
    tokenizer = Pairwise(eos_token="</s>", chat_template=VICUNA)
    pairwise = ChatTokens(tokenizer, "model")
    assert pairwise.response([user("even")], assistant("hey."))[-1] == pairwise.end_of_turn
    with pytest.raises(
        UserError, match=r"joins the end of the prompt and the beginning of the answer in one token, and has no tokenizer\.json"
    ):
        pairwise.response([user("odd")], assistant("hey."))


# Dates


def test_a_template_that_writes_a_date_as_llama_3_2_does_gives_the_same_tokens_on_any_day() -> None:
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}\n" + VICUNA
    with_date = templated(sentencepiece(MISTRAL, prefix_space="first"), dated, bos_token="<s>", eos_token="</s>")
    assert with_date.tokenizer.decode(with_date.prompt(ASKED)) == "26 Jul 2024\nuser: why\nassistant: "
