"""`finespun models`."""

from __future__ import annotations


def models() -> None:
    """List the known models and which of them are on this machine."""
    from rich.console import Console
    from rich.table import Table

    from finespun.errors import ModelNotFound
    from finespun.models.catalog import KNOWN_MODELS, locate

    table = Table("name", "size", "here", "hub", "what", box=None, pad_edge=False)
    for name, known in KNOWN_MODELS.items():
        try:
            here = "not converted yet" if locate(name, download=False).kind == "package" else "yes"
        except ModelNotFound:
            here = "no"
        table.add_row(name, known.parameters, here, known.hub_id, f"{known.about}; {known.licence}")
    # a table is read by people and by grep: its rows are never wrapped or cut
    Console(width=160, soft_wrap=True).print(table)
    print("\nA model that is not here is fetched from the hub on first use, or by: hf download HUB-NAME")
    print("Any other name is looked up as a folder, a .gguf file, or a model on the hub.")
