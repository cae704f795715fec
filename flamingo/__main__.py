"""`python -m flamingo doctor` says what is installed and what is missing; `generate` speaks; `chat` talks; `convert`
takes released checkpoints of OpenFlamingo, Otter and IDEFICS; `conformance` puts language models through the library's
equalities.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flamingo.convert.cli import add_arguments
from flamingo.convert.cli import run as convert
from flamingo.errors import UserError, first_line
from flamingo.terminal import printable

NEEDED = ("torch", "torchvision", "transformers", "open_clip_torch", "timm", "safetensors", "pillow", "numpy")
OPTIONAL = {
    "xformers": "attention on CUDA",
    "webdataset": "training data",
    "hydra-core": "train.py and python -m eval",
    "scikit-learn": "the digits data set",
    "matplotlib": "plots",
    "tensorboard": "training curves",
}
DEMONSTRATIONS = {"make demo": ("float32", 17.5, 135.0), "make real": ("bfloat16", 24.5, 979.0)}
"""What its time depends on, the minutes that it took on a machine, and that machine's speed in GFLOP/s."""


def doctor() -> int:
    """Print versions, devices and attention backends; return 1 if something needed is missing."""
    missing = 0
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in NEEDED:
        installed = _version(name)
        missing += installed is None
        print(f"  {name:16} {installed or 'MISSING: pip install flamingo-vlm'}")
    for name, use in OPTIONAL.items():
        print(f"  {name:16} {_version(name) or 'not installed'} ({use})")
    if missing:
        return 1
    import torch

    from flamingo.layers.attention import xformers_error

    print(f"cpu: {torch.get_num_threads()} threads; attention by torch's SDPA")
    speeds = {kind: _product_speed(getattr(torch, kind)) for kind in ("float32", "bfloat16")}
    print(f"cpu: {speeds['float32']:,.0f} GFLOP/s in float32, {speeds['bfloat16']:,.0f} in bfloat16")
    for command, (kind, minutes, speed) in DEMONSTRATIONS.items():
        print(f"{command}: about {max(1, round(minutes * speed / speeds[kind]))} minutes here, if nothing else runs")
    if not torch.cuda.is_available():
        print("cuda: none")
        return 0
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        print(f"cuda:{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, bfloat16 {bf16}")
    error = xformers_error()
    print("attention on cuda: " + ("xformers" if error is None else f"torch's SDPA, slower: no xformers ({error})"))
    return 0


def _product_speed(dtype: Any, side: int = 1024, seconds: float = 0.3) -> float:
    """Return the GFLOP/s of matrix products of `side` x `side`: the best of those that fit into some time."""
    import torch

    matrix, best, end = torch.ones(side, side, dtype=dtype), math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == math.inf:
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2e-9 * side**3 / best


def loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and the processor of `options.model`, on `options.device`."""
    for name in ("max_new_tokens", "beams"):
        if (value := getattr(options, name, 1)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    import torch
    from transformers.utils import logging

    from flamingo.modeling import FlamingoForConditionalGeneration
    from flamingo.processor import FlamingoProcessor

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # no such device; torch without CUDA
        raise UserError(f"--device {options.device} cannot be used: {first_line(error)}") from None
    processor = FlamingoProcessor.from_pretrained(options.model)
    return FlamingoForConditionalGeneration.from_pretrained(options.model).to(options.device).eval(), processor


def generate(options: argparse.Namespace) -> int:
    """Load a saved model and print how it continues the prompt."""
    import torch

    from flamingo.processor import IMAGE_TOKEN

    model, processor = loaded(options)
    prompt = options.prompt
    if IMAGE_TOKEN not in prompt:
        prompt = IMAGE_TOKEN * len(options.image) + prompt
    inputs = processor(images=[options.image], text=[prompt]).to(options.device)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=options.max_new_tokens, num_beams=options.beams)
    print(printable(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :])[0].strip()))
    return 0


def chat(options: argparse.Namespace) -> int:
    """Converse about images by their paths: lines in, answers out."""
    from flamingo.chat import HELP, ChatSession, converse, terminal_lines

    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature {options.temperature} must be 0 (greedy) or more")
    model, processor = loaded(options)
    if options.template:
        processor.chat_template = options.template
    if sys.stdin.isatty():
        print(HELP)
    drawn = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    converse(
        lambda: ChatSession(model, processor, options.system),
        terminal_lines(),
        print,
        max_new_tokens=options.max_new_tokens,
        **drawn,
    )
    return 0


def conformance(options: argparse.Namespace) -> int:
    """Print a table of language models and checks; return 1 if one fails."""
    from functools import partial

    from transformers.utils import logging

    from flamingo.conformance.checks import CHECKS, conform, print_table
    from flamingo.conformance.tiny_models import FAMILIES, loaded_lm

    logging.disable_progress_bar()
    if unknown := [check for check in options.checks or () if check not in CHECKS]:
        raise UserError(f"--checks {unknown[0]}: there is no such check; checks are {', '.join(CHECKS)}")
    makes = {name: partial(loaded_lm, name) for name in options.language or FAMILIES}
    for make in makes.values():
        make()  # refuse a name that cannot be loaded before anything is checked
    wanted = [check for check in CHECKS if check in (options.checks or CHECKS)]
    return int(print_table(wanted, ((name, conform(make, wanted)) for name, make in makes.items())) > 0)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a `UserError` becomes one line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="python -m flamingo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, devices, attention backends, what is missing")
    speak = commands.add_parser("generate", help="continue a prompt about images")
    speak.add_argument("--model", required=True, help="folder written by save_pretrained")
    speak.add_argument("--image", action="append", default=[], help="file of an image; again for the next one")
    speak.add_argument("--prompt", default="", help="text; <image> marks the images, else they come first")
    speak.add_argument("--max-new-tokens", type=int, default=32, help="most tokens of the answer")
    speak.add_argument("--beams", type=int, default=1, help="beams; 1 is greedy")
    speak.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    talk = commands.add_parser("chat", help="a conversation in the terminal, images by path")
    talk.add_argument("model", help="folder written by save_pretrained")
    talk.add_argument("--system", default="", metavar="TEXT", help="the system's message")
    talk.add_argument("--template", default="", metavar="NAME", help="another chat template: a name or a Jinja file")
    talk.add_argument("--max-new-tokens", type=int, default=256, help="most tokens of an answer")
    talk.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    talk.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    conform = commands.add_parser("conformance", help="does a language model work inside a Flamingo?")
    conform.add_argument("language", nargs="*", help="families, folders or names; all families by default")
    conform.add_argument("--checks", nargs="+", help="some checks only, by name")
    add_arguments(commands.add_parser("convert", help="a released checkpoint to a folder that from_pretrained loads"))
    options = parser.parse_args(arguments)
    known = {
        "doctor": lambda options: doctor(),
        "generate": generate,
        "chat": chat,
        "conformance": conformance,
        "convert": convert,
    }
    try:
        return known[options.command](options)
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
