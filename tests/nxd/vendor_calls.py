"""What our engine uses of neuronx_distributed and optimum-neuron, and how, read from its source text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[2] / "esm_neuron" / "backends" / "neuron.py"
CONTRACT = Path(__file__).resolve().parent / "contract.json"
"""As the real packages have them, NxD in the version named there: `calls`, each function's parameters, those with a
default marked by `=`; `attributes` of the ZeRO-1 optimizer; `names`, the optimum-neuron objects imported, in words."""

ZERO1 = "neuronx_distributed.optimizer.NeuronZero1Optimizer"
ROOTS = {"self._nxd": "neuronx_distributed", "nxd": "neuronx_distributed", "zero": ZERO1}
"""How the engine's source spells the package, and an optimizer of its."""


@dataclass(frozen=True)
class Call:
    """One call in the engine."""

    line: int
    positional: int
    keywords: tuple[str, ...]


def vendor_calls(source: str | None = None) -> dict[str, list[Call]]:
    """Full name of each called function -> the calls; locals that stand for a module are followed."""
    tree = ast.parse(_source(source))
    spelled = dict(ROOTS)
    for target, value in _assignments(tree):
        path = _resolve(value, spelled)
        if path is not None and not path.startswith(f"{ZERO1}."):  # its values are no vendor's functions
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


def attributes(source: str | None = None) -> set[str]:
    """Attributes of the ZeRO-1 optimizer that are read or set, by name or by `getattr(optimizer, ...)`."""
    tree = ast.parse(_source(source))
    found = {node.attr for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and ROOTS.get(ast.unparse(node.value)) == ZERO1}  # fmt: skip
    called = {name.rpartition(".")[2] for name in vendor_calls(source) if name.startswith(f"{ZERO1}.")}
    asked = (
        node.args[1].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and [ast.unparse(part) for part in (node.func, *node.args[:1])] == ["getattr", "optimizer"]
        and isinstance(node.args[1], ast.Constant)
    )
    return (found - called) | set(map(str, asked))


def imported(source: str | None = None, package: str = "optimum") -> set[str]:
    """Full names of what is imported from `package`."""
    imports = (node for node in ast.walk(ast.parse(_source(source))) if isinstance(node, ast.ImportFrom))
    return {f"{i.module}.{a.name}" for i in imports if (i.module or "").split(".")[0] == package for a in i.names}


def misfits(calls: dict[str, list[Call]], contract: dict[str, list[str]]) -> list[str]:
    """What in `calls` the contract's signatures do not take, or miss."""
    wrong = [f"{name} is not in {CONTRACT.name}" for name in calls if name not in contract]
    for name, parameters in ((name, contract[name]) for name in calls if name in contract):
        names = [p.rstrip("=") for p in parameters]
        anything = any(p.startswith("*") for p in parameters)
        for call in calls[name]:
            unknown = [k for k in call.keywords if k not in names and not anything]
            missing = [
                p for p in parameters[call.positional :] if p[-1] != "=" and p[0] != "*" and p not in call.keywords
            ]
            if unknown or missing or (call.positional > len(parameters) and not anything):
                given = unknown or (f"without {missing}" if missing else call.positional)
                wrong.append(f"line {call.line}: {name} takes {parameters}, not {given}")
    return wrong


def _source(source: str | None) -> str:
    return ENGINE.read_text(encoding="utf-8") if source is None else source


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
