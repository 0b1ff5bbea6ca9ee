"""Small inputs shared by the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from planner.cli import main
from planner.engine import Engine, engine
from planner.hardware import Cluster, parse_cluster
from planner.model import ModelConfig, load


@pytest.fixture(scope="session")
def mixtral() -> ModelConfig:
    return load("mistralai/Mixtral-8x7B-v0.1")


@pytest.fixture(scope="session")
def deepseek() -> ModelConfig:
    return load("deepseek-ai/DeepSeek-V3")


@pytest.fixture(scope="session")
def h200() -> Cluster:
    return parse_cluster("h200-sxm:2x8")


@pytest.fixture(scope="session")
def vllm() -> Engine:
    return engine("vllm")


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moeplan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `moeplan` with these arguments; gives exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call
