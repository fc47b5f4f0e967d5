"""`internlm deploy`."""

from __future__ import annotations

import argparse
import sys

from internlm.errors import UsageError, WeightsError

DESCRIPTION = """\
Hand a model over to another engine: the exact command for this model, after checks of what the engine reads.

  internlm deploy out --engine vllm                   print the command
  internlm deploy out --engine lmdeploy --tensor 2 --run
  internlm deploy runs/a --engine llama.cpp           says which `internlm convert` comes first
  internlm deploy --table                             what each engine supports, and how that is known

The command goes to stdout, everything else to stderr. One machine and no other engine: `internlm serve`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from internlm.serve.handover.peers import PEERS

    parser.add_argument("model", metavar="MODEL", nargs="?", help="run, checkpoint, Transformers folder, GGUF file …")
    parser.add_argument("--engine", metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--print", action="store_true", help="print the command (default)")
    parser.add_argument("--run", action="store_true", help="become the engine")
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="GPUs that share each layer")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer (default: the model's)")
    parser.add_argument("--name", metavar="NAME", help="of the model, for clients (default: of its folder)")
    parser.add_argument("--api-key", metavar="KEY", help="that clients must send")
    parser.add_argument("--table", action="store_true", help="print what each engine supports")


def run(arguments: argparse.Namespace) -> int:
    """Print the command, or become it."""
    from internlm.serve.handover import peers

    if arguments.table:
        print(peers.markdown())
        return 0
    if arguments.model is None:
        raise UsageError("is missing", where="MODEL")
    if arguments.engine is None:
        raise UsageError("is missing", where="--engine", allowed=peers.PEERS)
    if arguments.print and arguments.run:
        raise UsageError("--print and --run exclude each other")
    from internlm.serve.handover import command as handover
    from internlm.serve.handover.found import Wish

    wish = Wish(
        engine=arguments.engine, host=arguments.host, port=arguments.port, tensor=arguments.tensor,
        context=arguments.context, name=arguments.name, api_key=arguments.api_key,
    )  # fmt: skip
    plan = handover.plan_for(arguments.model, wish)
    for finding in plan.findings:
        print(f"- {finding.what}. {finding.do}", file=sys.stderr)
    if plan.command is None:
        raise WeightsError(f"{arguments.engine} would not serve it right", where=arguments.model, do="See above.")
    for name, fact in plan.facts.items():
        print(f"{name + ':':16}{fact}", file=sys.stderr)
    if arguments.run and plan.before is not None:
        raise UsageError("the model has to be converted first", where="--run", do=f"Run: {plan.before}")
    if arguments.run:
        handover.run(plan.command)
    print(*[command for command in (plan.before, plan.command) if command is not None], sep="\n")
    return 0
