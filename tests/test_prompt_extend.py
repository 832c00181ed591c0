import base64
import gc
import io
import json
import socket
import threading
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from wan.utils import prompt_extend
from wan.utils.prompt_extend import INSTRUCTIONS, LOCAL_MODELS, PromptOutput, extend_prompt

PROMPT = "a red ball rolls to the right"
KEY = "sk-test-0123456789"
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture(width=60, height=40, color="red"):
    return Image.new("RGB", (width, height), color)


# --- local models


def save_tokenizer(folder, template=TEMPLATE):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([PROMPT], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_sampling(folder):
    transformers.GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=2, pad_token_id=0
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    save_tokenizer(folder)
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    save_sampling(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2.5-vl")
    number = save_tokenizer(folder).convert_tokens_to_ids
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    torch.manual_seed(0)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    save_sampling(folder)
    preprocessing = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    preprocessing |= {"min_pixels": 4 * 28 * 28, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing | {"temporal_patch_size": 2}))
    return str(folder)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(prompt_extend, "MAX_NEW_TOKENS", 12)


@pytest.fixture
def asked(monkeypatch):
    """What each call of a model's generate() got, and weak references to the models."""
    calls, networks = [], []
    real = transformers.GenerationMixin.generate

    def generate(self, **inputs):
        calls.append(inputs)
        networks.append(weakref.ref(self))
        return real(self, **inputs)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    return calls, networks


def local(prompt=PROMPT, **options):
    return extend_prompt(prompt, method="local_qwen", device="cpu", **options)


def test_local_text_model(text_model, short, asked):
    result = local(model=text_model, target_lang="en", seed=1)
    assert result.status, result.message
    assert result.prompt and result.prompt != PROMPT and "\n" not in result.prompt
    assert (result.seed, result.message) == (1, f"answered by {text_model}")
    (inputs,), _ = asked
    tokenizer = transformers.AutoTokenizer.from_pretrained(text_model)
    assert tokenizer.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>system\n{INSTRUCTIONS['en'].format(pictures='')}<|im_end|>\n"
        f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert result.system_prompt == INSTRUCTIONS["en"].format(pictures="")


def test_the_answer_is_what_the_model_wrote_after_the_question(text_model, short, monkeypatch):
    words = transformers.AutoTokenizer.from_pretrained(text_model)(
        "  a ball,\n\nred  <|im_end|>", return_tensors="pt"
    )

    def generate(self, input_ids, **options):
        return torch.cat([input_ids, words["input_ids"]], dim=1)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    assert local(model=text_model).prompt == "a ball, red"


def test_seed_decides(text_model, short):
    answers = [local(model=text_model, seed=seed).prompt for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]


def test_negative_seed_is_drawn(text_model, short):
    result = local(model=text_model)
    assert result.seed >= 0
    assert local(model=text_model, seed=result.seed).prompt == result.prompt


def test_stored_type_is_kept(text_model, short, monkeypatch):
    seen = []
    real = transformers.GenerationMixin.generate
    monkeypatch.setattr(
        transformers.GenerationMixin,
        "generate",
        lambda self, **k: (seen.append(self.dtype), real(self, **k))[1],
    )
    assert local(model=text_model).status
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("target_lang", ["zh", "en"])
def test_local_vision_model(vision_model, short, asked, count, target_lang):
    images = [picture(), picture(500, 300, "blue")][:count]
    result = local(model=vision_model, images=images, target_lang=target_lang, seed=1)
    assert result.status, result.message
    (inputs,), _ = asked
    tokenizer = transformers.AutoTokenizer.from_pretrained(vision_model)
    question = tokenizer.decode(inputs["input_ids"][0])
    assert result.system_prompt in question and question.count("<|vision_start|>") == count
    places = question.count("<|image_pad|>")
    if count:
        assert inputs["image_grid_thw"].shape == (count, 3)
        assert places == sum(inputs["image_grid_thw"].prod(1).tolist()) // 4
    else:
        assert places == 0 and "pixel_values" not in inputs


def test_what_the_pictures_show_matters(vision_model, short):
    answers = [
        local(model=vision_model, images=[picture(color=color)], seed=1).prompt for color in ("red", "green")
    ]
    assert answers[0] != answers[1]


def test_large_pictures_are_scaled_down(vision_model, short, asked):
    assert local(model=vision_model, images=[picture(4000, 3000)]).status
    (inputs,), _ = asked
    assert inputs["image_grid_thw"].prod().item() // 4 <= 1280 * 1.05


def test_vision_input_equals_the_models_own_processor(vision_model, short, asked, monkeypatch):
    images = [picture(), picture(300, 200, "blue")]
    assert local(model=vision_model, images=images, target_lang="en").status
    (inputs,), _ = asked
    # Its video half is not needed here and cannot be built without torchvision.
    monkeypatch.setattr(
        transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *arguments: None
    )
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.AutoImageProcessor.from_pretrained(vision_model),
        transformers.AutoTokenizer.from_pretrained(vision_model),
        chat_template=TEMPLATE,
    )
    system = INSTRUCTIONS["en"].format(pictures=prompt_extend.PICTURES["en"][2])
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": PROMPT}]
    expected = processor.apply_chat_template(
        [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": content},
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert {"input_ids", "pixel_values", "image_grid_thw"} <= set(expected)
    for key, value in expected.items():
        assert torch.equal(inputs[key], value), key


def test_defaults_are_the_known_names(monkeypatch):
    asked_for = []

    def missing(name, **options):
        asked_for.append(name)
        raise OSError("offline")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", missing)
    local()
    local(images=[picture()])
    local(model="Qwen2.5_3B")
    local(model="someone/else")
    assert asked_for == [
        "Qwen/Qwen2.5-14B-Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        LOCAL_MODELS["Qwen2.5_3B"],
        "someone/else",
    ]


def failed(result, prompt=PROMPT):
    assert result == PromptOutput(False, prompt, result.seed, result.system_prompt, result.message)
    assert result.message and "\n" not in result.message
    return result.message


def test_text_model_cannot_see(text_model):
    assert "--prompt_extend_model needs a vision-language model" in failed(
        local(model=text_model, images=[picture()])
    )


def test_local_model_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failed(local(model=str(tmp_path / "nothing")))


def test_local_model_damaged(text_model, tmp_path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = f"{text_model}/{file}"
        with open(source, "rb") as content:
            (tmp_path / file).write_bytes(content.read())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    failed(local(model=str(tmp_path)))


def test_empty_answer(text_model, short, monkeypatch):
    monkeypatch.setattr(
        transformers.GenerationMixin, "generate", lambda self, input_ids, **options: input_ids
    )
    assert "empty answer" in failed(local(model=text_model))


def test_template_without_place_for_images(vision_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerBase,
        "apply_chat_template",
        lambda self, messages, **options: "no place",
    )
    assert "0 places for 1 images" in failed(local(model=vision_model, images=[picture()]))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_gone_afterwards(text_model, short, asked, monkeypatch, fails):
    _, networks = asked
    if fails:
        monkeypatch.setattr(
            transformers.GenerationMixin, "_validate_model_kwargs", lambda *arguments: 1 / 0, raising=True
        )
    gc.disable()
    try:
        result = local(model=text_model)
        assert result.status != fails
        assert [network() for network in networks] == [None]
    finally:
        gc.enable()


def test_the_device_is_empty_afterwards(text_model, short):
    from virtual_gpu import VirtualGPU

    with VirtualGPU() as gpu:
        result = extend_prompt(PROMPT, method="local_qwen", model=text_model, seed=1, device="vgpu")
        assert result.status, result.message
        assert gpu.peak > 0 and gpu.live == 0
    with VirtualGPU(capacity=gpu.peak // 4) as gpu:
        assert "out of memory" in failed(
            extend_prompt(PROMPT, method="local_qwen", model=text_model, device="vgpu")
        )
        assert gpu.live == 0
    assert result.prompt == local(model=text_model, seed=1).prompt


# --- the HTTP service


@pytest.fixture
def service(monkeypatch):
    """A server that gives `replies` [(status, bytes)] in turn, the last one again and again, and keeps `requests`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append((self.path, dict(self.headers), json.loads(body)))
            replies = server.replies
            status, reply = replies.pop(0) if len(replies) > 1 else replies[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("DASH_API_KEY", KEY)
    monkeypatch.setenv("DASH_API_URL", f"http://127.0.0.1:{server.server_port}/api/v1/")
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr(prompt_extend.time, "sleep", waited.append)
    return waited


def reply(content):
    message = {"role": "assistant", "content": content}
    return json.dumps({"output": {"choices": [{"finish_reason": "stop", "message": message}]}}).encode()


def remote(**options):
    return extend_prompt(PROMPT, method="dashscope", **options)


def test_service_text(service):
    service.replies = [(200, reply("一只红球\n向右滚动"))]
    result = remote(seed=7)
    assert (result.status, result.prompt, result.message) == (
        True,
        "一只红球 向右滚动",
        "answered by qwen-plus",
    )
    ((path, headers, body),) = service.requests
    assert path == "/api/v1/services/aigc/text-generation/generation"
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Content-Type"] == "application/json"
    assert body == {
        "model": "qwen-plus",
        "input": {
            "messages": [
                {"role": "system", "content": INSTRUCTIONS["zh"].format(pictures="")},
                {"role": "user", "content": PROMPT},
            ]
        },
        "parameters": {"result_format": "message", "seed": 7},
    }


@pytest.mark.parametrize("count", [1, 2])
def test_service_pictures(service, count):
    service.replies = [(200, reply([{"text": "a better prompt"}]))]
    images = [picture(), picture(3000, 1000, "blue")][:count]
    result = remote(images=images, target_lang="en", model="my-vl", seed=2**40 + 5)
    assert (result.status, result.prompt) == (True, "a better prompt")
    ((path, _, body),) = service.requests
    assert path == "/api/v1/services/aigc/multimodal-generation/generation"
    assert body["model"] == "my-vl" and body["parameters"]["seed"] == 5
    system, user = body["input"]["messages"]
    assert system == {"role": "system", "content": [{"text": result.system_prompt}]}
    *pictures, text = user["content"]
    assert text == {"text": PROMPT} and len(pictures) == count
    for sent, image in zip(pictures, images):
        kind, data = sent["image"].split(",")
        assert kind == "data:image/png;base64"
        decoded = Image.open(io.BytesIO(base64.b64decode(data)))
        assert decoded.getpixel((0, 0)) == image.getpixel((0, 0))
        assert decoded.width * decoded.height <= 512 * 512 * 1.01
        assert decoded.width / decoded.height == pytest.approx(image.width / image.height, rel=0.01)


def test_service_default_for_pictures(service):
    service.replies = [(200, reply([{"text": "x"}]))]
    assert remote(images=[picture()]).message == "answered by qwen-vl-max"


def test_service_without_key(monkeypatch):
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    assert "DASH_API_KEY is not set" in failed(remote())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "nonsense", "http://["])
def test_service_at_no_address(service, monkeypatch, url):
    monkeypatch.setenv("DASH_API_URL", url)
    failed(remote())
    assert service.requests == []


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1.example.com", "10.0.0.1"])
def test_the_key_is_not_sent_in_clear(service, monkeypatch, host):
    monkeypatch.setenv("DASH_API_URL", f"http://{host}/api/v1")
    message = failed(remote())
    assert "would send the key in clear" in message and KEY not in message


def test_service_refuses(service, waits):
    service.replies = [(401, b'{"code": "InvalidApiKey", "message": "No such key."}')]
    message = failed(remote())
    assert "401" in message and "InvalidApiKey" in message and KEY not in message
    assert len(service.requests) == 1 and waits == []


def test_service_is_busy_at_first(service, waits):
    service.replies = [(429, b"{}"), (503, b""), (200, reply("better"))]
    assert remote().prompt == "better"
    assert len(service.requests) == 3 and waits == [1, 2]


def test_service_stays_busy(service, waits):
    service.replies = [(500, b"oops")]
    assert "500" in failed(remote())
    assert len(service.requests) == 4 and waits == [1, 2, 4]


def test_no_network(monkeypatch, waits):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("DASH_API_KEY", KEY)
    monkeypatch.setenv("DASH_API_URL", f"http://127.0.0.1:{port}/api/v1")
    monkeypatch.setenv("no_proxy", "*")
    assert "refused" in failed(remote())
    assert waits == [1, 2, 4]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"\xff\xfe\xff",
        b"[]",
        b"null",
        b'{"output": {}}',
        b'{"output": {"choices": []}}',
        reply(None),
        reply([]),
    ],
)
def test_service_talks_nonsense(service, content):
    service.replies = [(200, content)]
    assert "unknown form" in failed(remote())


def test_service_says_nothing(service):
    service.replies = [(200, reply(" \n"))]
    assert "empty answer" in failed(remote())


# --- the instructions


def test_instructions_differ_and_are_in_their_language():
    texts = {}
    for language in ("zh", "en"):
        for count in range(3):
            filled = INSTRUCTIONS[language].format(pictures=prompt_extend.PICTURES[language][count])
            texts[language, count] = filled
            chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in filled) / len(filled)
            assert chinese > 0.8 if language == "zh" else chinese == 0
    assert len(set(texts.values())) == 6
