"""Groups of clients, as a run file gives them."""

from __future__ import annotations

from collections.abc import Sequence

from cutlayer.errors import MethodError, suggest


def dealt(clients: Sequence[str], groups: int | Sequence[Sequence[str]], framework: str) -> list[list[str]]:
    """The clients of each group: dealt one by one to a number of groups, or as listed.

    Raises:
        MethodError: there are more groups than clients, a group is empty, or a client is unknown, in none or in two.
    """
    if isinstance(groups, int):
        if groups > len(clients):
            raise MethodError(
                f"framework '{framework}': {groups} groups for {len(clients)} clients leave a group without clients. "
                "Take fewer groups, or more clients."
            )
        return [list(clients[number::groups]) for number in range(groups)]
    named = [client for group in groups for client in group]
    problems = [f"group {number} has no clients" for number, group in enumerate(groups) if not group]
    problems += [f"'{name}' is no client.{suggest(name, clients)}" for name in named if name not in clients]
    problems += [f"'{client}' is in no group" for client in clients if client not in named]
    problems += [f"'{client}' is in more than one group" for client in clients if named.count(client) > 1]
    if problems:
        raise MethodError(f"framework '{framework}': the groups do not fit the clients: {'; '.join(problems)}.")
    return [list(group) for group in groups]
