"""Where to spend a budget: one choice for each layer, so that the sum of the expected losses is smallest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Menu:
    """What can be done with one layer: `costs` and `losses` [choices], in any order; one of them is usually to leave it as it is."""

    costs: np.ndarray
    losses: np.ndarray


def allocate(menus: Sequence[Menu], budget: float) -> list[int]:
    """The index of the choice for each menu: sum of costs at most `budget`, sum of losses as small as a Lagrangian multiplier finds it.

    Each layer takes what minimises loss + price * cost, at the lowest price that the budget allows (Shoham and Gersho 1988); what is left of
    the budget then buys, one after the other, the steps that gain most per unit. The sum of losses is above the optimum by less than what one step
    of one layer gains. Raises ValueError where not even the cheapest choices fit.
    """
    least = sum(float(menu.costs.min()) for menu in menus)
    if least > budget:
        raise ValueError(f"at least {least:g}")
    low, high = 0.0, 1.0
    while _spent(menus, _at_price(menus, high)) > budget:
        high *= 4
        if high > 1e300:  # no price makes the cheapest best, so take it
            return [int(np.lexsort((menu.losses, menu.costs))[0]) for menu in menus]
    for _ in range(100):
        price = (low + high) / 2 if low == 0 else (low * high) ** 0.5
        if _spent(menus, _at_price(menus, price)) > budget:
            low = price
        else:
            high = price
        if low == 0 and high < 1e-300:
            break
    chosen = _at_price(menus, high)
    return _spend_the_rest(menus, chosen, budget)


def _at_price(menus: Sequence[Menu], price: float) -> list[int]:
    return [int(np.lexsort((menu.costs, menu.losses + price * menu.costs))[0]) for menu in menus]


def _spent(menus: Sequence[Menu], chosen: Sequence[int]) -> float:
    return sum(float(menu.costs[choice]) for menu, choice in zip(menus, chosen, strict=True))


def _spend_the_rest(menus: Sequence[Menu], chosen: list[int], budget: float) -> list[int]:
    left = budget - _spent(menus, chosen)
    while True:
        best, gain = None, 0.0
        for layer, menu in enumerate(menus):
            more = menu.costs - menu.costs[chosen[layer]]
            gained = menu.losses[chosen[layer]] - menu.losses
            fits = np.flatnonzero((more <= left) & (gained > 0))
            if not len(fits):
                continue
            rates = gained[fits] / np.maximum(more[fits], 1e-300)
            if rates.max() > gain:
                best, gain = (layer, int(fits[rates.argmax()])), float(rates.max())
        if best is None:
            return chosen
        layer, choice = best
        left -= float(menus[layer].costs[choice] - menus[layer].costs[chosen[layer]])
        chosen[layer] = choice
