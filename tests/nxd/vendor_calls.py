"""Which functions of neuronx_distributed our engine calls, and how, read from its source text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[2] / "esm_neuron" / "backends" / "neuron.py"
CONTRACT = Path(__file__).resolve().parent / "contract.json"
"""Name of every function of `vendor_calls` -> its parameters, as the real package has them."""

ROOTS = {"self._nxd": "neuronx_distributed", "nxd": "neuronx_distributed"}
"""How the engine's source spells the package."""


@dataclass(frozen=True)
class Call:
    """One call in the engine."""

    line: int
    positional: int
    keywords: tuple[str, ...]


def vendor_calls(source: str | None = None) -> dict[str, list[Call]]:
    """Full name of each called function -> the calls; locals that stand for a module are followed."""
    tree = ast.parse(ENGINE.read_text(encoding="utf-8") if source is None else source)
    spelled = dict(ROOTS)
    for target, value in _assignments(tree):
        path = _resolve(value, spelled)
        if path is not None:
            spelled[target] = path
    calls: dict[str, list[Call]] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        dictionaries = {t: v for t, v in _assignments(function) if isinstance(v, ast.Dict)}
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = _resolve(call.func, spelled)
            if name is not None:
                keywords = tuple(_keywords(call, dictionaries))
                calls.setdefault(name, []).append(Call(call.lineno, len(call.args), keywords))
    return calls


def misfits(calls: dict[str, list[Call]], contract: dict[str, list[str]]) -> list[str]:
    """What in `calls` the contract's signatures do not take."""
    wrong = [f"{name} is not in {CONTRACT.name}" for name in calls if name not in contract]
    for name, parameters in ((name, contract[name]) for name in calls if name in contract):
        anything = any(p.startswith("*") for p in parameters)
        for call in calls[name]:
            unknown = [k for k in call.keywords if k not in parameters and not anything]
            if unknown or (call.positional > len(parameters) and not anything):
                wrong.append(f"line {call.line}: {name} takes {parameters}, not {unknown or call.positional}")
    return wrong


def _assignments(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = zip(target.elts, value.elts, strict=True) if _both_tuples(target, value) else [(target, value)]
            yield from ((ast.unparse(t), v) for t, v in pairs)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield ast.unparse(node.target), node.value


def _both_tuples(target: ast.expr, value: ast.expr) -> bool:
    return isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)


def _resolve(node: ast.expr, spelled: dict[str, str]) -> str | None:
    text = ast.unparse(node)
    if text in spelled:
        return spelled[text]
    if isinstance(node, ast.Attribute):
        path = _resolve(node.value, spelled)
        return None if path is None else f"{path}.{node.attr}"
    return None


def _keywords(call: ast.Call, dictionaries: dict[str, ast.expr]) -> Iterator[str]:
    for keyword in call.keywords:
        expanded = dictionaries.get(ast.unparse(keyword.value))
        if keyword.arg is not None:
            yield keyword.arg
        elif isinstance(expanded, ast.Dict):
            yield from (key.value for key in expanded.keys if isinstance(key, ast.Constant))
        else:
            raise ValueError(f"line {call.lineno}: **{ast.unparse(keyword.value)} cannot be followed")
