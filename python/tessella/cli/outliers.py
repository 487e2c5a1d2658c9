"""``tessella outliers``: a model that computes the same, with the activations of a large one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessella.cli.session import CommandError, Debug, Json, session


def outliers(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to create; must be new or empty.")],
    fraction: Annotated[float, typer.Option(help="Of the hidden state's channels.")] = 0.01,
    factor: Annotated[float, typer.Option(help="By which they grow.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of the choice of channels.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Give a model the activation outliers of a large one; what it computes stays the same.

    Some channels of the normalised hidden state grow by a factor in the norm's
    weight, and the linears that read them shrink by it. What a quantisation
    recipe makes of outliers can then be seen on a small model.

    JSON: channels (indices), layers, bytes.

    \b
    Examples:
      tessella outliers ./model ./model-x20 --fraction 0.01 --factor 20
      tessella outliers ./model ./model-x100 --factor 100 --json
    """
    with session(json=json, debug=debug) as s:
        from tessella.models import outliers as made

        try:
            wanted = made.Outliers(fraction, factor, seed)
        except ValueError as e:
            raise CommandError(str(e)) from None
        answer = made.convert(model, out, wanted)
        n = len(answer["channels"])
        s.show(f"{n} channels of {answer['layers']} layers grew by {factor:g}: {out}")
        s.answer(answer)
