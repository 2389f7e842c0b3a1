"""Graph to CudaProgram: the groups, the memory plan and the plan of the CPU's generator, with kernels of a grid of threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ...ir import cuda_program as cuda
from ...ir.errors import CompileError
from ...ir.graph import Graph
from ...ir.program import Argument, KernelInfo
from ...ir.target import Target
from .. import plan as tree
from ..arena import arena_use
from ..assembly import Builder, Lower, check_static, groups_of, problem_of, steps_of
from ..loop_ir import Kernel, Module
from ..loop_text import numbered_kernel
from ..memory_plan import check_plan, plan_memory
from ..plan import EntryPlan, print_plan
from .attention import lower_attention
from .compile import data_layout, ptx
from .contraction import lower_contraction
from .emit import module_text
from .machine import sm_of
from .maps import lower_map
from .persistent import WAYS, Parts, one_kernel
from .products import lower_coded, lower_sparse
from .reduces import lower_reduce
from .rows import lower_rows
from .scans import lower_scan
from .shape import launches_of, shape_of
from .sorts import lower_sort
from .together import joined_updates, kept_for_updates
from .updates import lower_scatter
from .verify import verify_launch

LOWERINGS: Final[dict[str, Lower]] = {
    "map": lower_map,
    "rows": lower_rows,
    "reduce": lower_reduce,
    "window": lower_reduce,
    "scan": lower_scan,
    "scatter": lower_scatter,
    "sort": lower_sort,
    "contraction": lower_contraction,
    "sparse": lower_sparse,
    "coded": lower_coded,
    "attention": lower_attention,
}


def generate(graph: Graph, target: Target, *, name: str = "main", verify: bool = False, loops: str = "auto") -> cuda.CudaProgram:
    """The CUDA program of a graph of static shapes, whose nodes are fused regions and lowered ops.

    `loops` says whether loops of small kernels become one kernel ('auto': where an estimate favours it; 'launches': never; 'one':
    wherever one block can run them). With `verify`, loop IR and memory plan are verified before code is made of them. Raises
    CompileError for a node that has no code, or an instruction that the SM lacks; VerifyError for a bug of the generator.
    """
    if loops not in WAYS:
        raise CompileError(f"loops become {', '.join(map(repr, WAYS))}, not {loops!r} (the flag cuda_loops)")
    sm_of(target)
    check_static(graph)
    b = Builder(graph, target, 1, lowerings=LOWERINGS, outer_align=cuda.ALIGN, serial=True)
    groups = groups_of(b)
    problem, number, constants = problem_of(b, groups)
    problem = kept_for_updates(problem, groups)
    plan = plan_memory(problem, beside=True)  # launches of independent branches go to streams of their own
    if verify:
        check_plan(plan, problem)
    nodes, infos = steps_of(b, groups, plan, constants, number)
    launches = {k.name: launches_of(k) for k in b.kernels.values()}
    nodes = [_whole(n, launches, b, loops, infos, at) for at, n in enumerate(nodes)]
    parts = {part.name: part for made in launches.values() for part, _ in made}
    flat = [step for k, n in enumerate(nodes) for step in _nodes([n], launches, k)]
    flat, made_one = joined_updates(flat, parts, {i for _, i in graph.aliases}, infos, b.fresh_name)
    used = {s.kernel for s in cuda.walk(flat) if isinstance(s, cuda.Step)}
    kernels = [k for k in (*parts.values(), *made_one) if k.name in used]
    if verify:
        from ..loop_verify import verify as verify_loops

        verify_loops(Module(tuple(kernels)))
        for k in kernels:
            verify_launch(k)
    sources, numbers = {}, {}
    for k in kernels:
        sources[k.name], numbers[k.name] = numbered_kernel(k)
    text, shared = module_text(kernels, target, data_layout(target), numbers)
    assembled = ptx(text, target) if kernels else ""
    table = tuple(_row(k, shared[k.name], sources[k.name]) for k in kernels)
    entry = EntryPlan(name, tuple(nodes))
    plain = all(isinstance(n, tree.Step) for n in nodes)
    printed = "\n\n".join(sources.values()) + ("\n" if sources else "")
    if not plain:
        printed += "".join(f"# {line}\n" for line in print_plan(entry).splitlines())
    return cuda.CudaProgram(
        name=name,
        target=target,
        inputs=tuple(Argument(str(n.attrs["name"]), n.tensor, str(n.attrs["role"])) for n in graph.inputs),
        outputs=tuple(Argument(o, n.tensor) for o, n in zip(graph.output_names, graph.outputs, strict=True)),
        constants=tuple(c.array for c in constants),
        arena_bytes=plan.arena_bytes,
        ptx=assembled,
        kernels=table,
        plan=tuple(flat),
        infos=tuple(infos),
        aliases=graph.aliases,
        use=arena_use(problem, plan),
        texts={"loops": printed, "llvm": text, "ptx": assembled},
    )


def _row(k: Kernel, shared: int, source: str) -> cuda.CudaKernel:
    from ..llvm.kernel import written_buffers

    grid, threads = shape_of(k)
    written = written_buffers(k, {})
    parameters = tuple(cuda.Parameter(b.name, b.dtype.name, b.span * b.dtype.itemsize, b.name in written) for b in k.buffers)
    return cuda.CudaKernel(k.name, grid, (threads, 1, 1), parameters, shared, source=source)


Launches = dict[str, Parts]


def _whole(
    node: tree.Node, launches: Launches, b: Builder, way: str, infos: list[KernelInfo], info: int, depth: int = 0
) -> tree.Node:
    """A node of the plan with the loops that one kernel runs as one step; their kernels are added to the launches."""

    def inner(nodes: Sequence[tree.Node], deeper: int = 0) -> tuple[tree.Node, ...]:
        return tuple(_whole(n, launches, b, way, infos, info, depth + deeper) for n in nodes)

    match node:
        case tree.Loop():
            loop = replace(node, nodes=inner(node.nodes, 1))
            made = one_kernel(loop, launches, f"loop_{len(launches)}", b.target, depth, way)
            if made is None:
                return loop
            kernel, views, note = made
            launches[kernel.name] = launches_of(kernel)
            infos[info] = replace(infos[info], note="; ".join(filter(None, (infos[info].note, note))))
            return tree.Step(kernel.name, views)
        case tree.Block():
            return replace(node, nodes=inner(node.nodes))
        case tree.Branch():
            return replace(node, then=inner(node.then), orelse=inner(node.orelse))
        case tree.While():
            return replace(node, test=inner(node.test), nodes=inner(node.nodes))
    return node


def _nodes(nodes: Sequence[tree.Node], launches: Launches, info: int) -> tuple[cuda.Node, ...]:
    """The plan's nodes with a step for each launch."""
    done: list[cuda.Node] = []
    for n in nodes:
        match n:
            case tree.Step(kernel, views):
                done += [cuda.Step(k.name, tuple(views[p] for p in places), info) for k, places in launches[kernel]]
            case tree.Block(inner) | tree.Section(inner):
                done += _nodes(inner, launches, info)
            case tree.Loop(count, inner, reverse, pointers, regions):
                if regions is not None:
                    raise CompileError("a loop whose passes run at once is planned for processors, not for a stream")
                done.append(cuda.Loop(count, _nodes(inner, launches, info), reverse, pointers))
            case tree.Branch(predicate, then, orelse):
                done.append(cuda.Branch(predicate, _nodes(then, launches, info), _nodes(orelse, launches, info)))
            case tree.While(test, predicate, inner):
                done.append(cuda.While(_nodes(test, launches, info), predicate, _nodes(inner, launches, info)))
    return tuple(done)


__all__ = ["LOWERINGS", "generate"]
