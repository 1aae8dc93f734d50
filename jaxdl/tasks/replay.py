"""What agents have lived through, kept to be learned from later: a ring of moments for each of many environments (Lin 1992; Mnih et al. 2015)."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdl.losses import n_step


@flax.struct.dataclass
class Replay:
    """`L` moments of `E` environments. As part of a state's carry it is in every checkpoint."""

    rows: PyTree
    """`L E ...`: `observation`, `action`, `reward`, `terminated`, `ended`, `next_observation`, oldest at `written % L` once it is full."""
    written: PyTree
    """Moments of each environment since the beginning."""
    priorities: PyTree
    """`L E`: how likely each is drawn, up to a factor; all 1 where all are alike."""

    @classmethod
    def of(cls, rows: PyTree, length: int) -> "Replay":
        """Of length `L`, beginning with rows `T E ...`, of which there are at most as many."""
        count, environments = jax.tree.leaves(rows)[0].shape[:2]
        room = lambda x: jnp.zeros((length, *x.shape[1:]), x.dtype).at[:count].set(x)
        return cls(jax.tree.map(room, rows), jnp.asarray(count, jnp.int32), jnp.ones((length, environments)))

    def add(self, row: PyTree) -> "Replay":
        """With one more moment of all environments, as likely as the likeliest."""
        place = self.written % len(self.priorities)
        rows = jax.tree.map(lambda x, new: x.at[place].set(new), self.rows, row)
        return Replay(rows, self.written + 1, self.priorities.at[place].set(self.priorities.max()))

    def ages(self) -> Int[Array, "L"]:
        """How many moments were written after each; more than `L` for places that nothing was written to."""
        length = len(self.priorities)
        age = (self.written - 1 - jnp.arange(length)) % length
        return jnp.where(age < self.written, age, 2 * length)

    def sample(
        self,
        key: Key[Array, ""],
        count: int,
        *,
        discount: float,
        steps: int = 1,
        weighted: float | Float[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """So many moments, each with the same probability, or in proportion to `priorities` where `weighted` is given, the exponent β of the weights that make up for it (Schaul et al. 2016, arXiv:1511.05952, section 3.4; 1 does so wholly).

        `reward`, `discount` and `next_observation` are those of up to `steps` steps from there on, fewer at the end of an episode; the last `steps − 1` moments are not drawn yet, as what follows them is not known. `place` and `environment` say where they are, for `prioritize`; `weight` is 1, or at most 1.
        """
        length, environments = self.priorities.shape
        if weighted is None:
            oldest, known = self.written - jnp.minimum(self.written, length), jnp.minimum(self.written, length) - (steps - 1)
            first, second = jax.random.split(key)
            place = (oldest + jax.random.randint(first, (count,), 0, known)) % length
            environment = jax.random.randint(second, (count,), 0, environments)
            weight = jnp.ones(count)
        else:
            age = self.ages()
            known = ((age >= steps - 1) & (age < length))[:, None]
            mass = jnp.where(known, self.priorities, 0).ravel()
            until = jnp.cumsum(mass)
            # One from each of as many equal parts of the whole (ibid., appendix B.2.1).
            at = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count * until[-1]
            drawn = jnp.minimum(jnp.searchsorted(until, at, side="right"), mass.size - 1)
            place, environment = drawn // environments, drawn % environments
            rare = (mass[drawn] * known.sum() * environments / until[-1]) ** -weighted
            weight = rare / rare.max()
        following = (place + jnp.arange(steps)[:, None]) % length
        then = lambda name: self.rows[name][following, environment]
        reward, discounts, last = n_step(then("reward"), then("terminated"), then("ended"), discount)
        return {
            "observation": self.rows["observation"][place, environment],
            "action": self.rows["action"][place, environment],
            "reward": reward,
            "discount": discounts,
            "next_observation": self.rows["next_observation"][(place + last) % length, environment],
            "place": place,
            "environment": environment,
            "weight": weight,
        }

    def prioritize(self, batch: dict[str, Any], priorities: Float[Array, "B"]) -> "Replay":
        """With other priorities for what was drawn."""
        return self.replace(priorities=self.priorities.at[batch["place"], batch["environment"]].set(priorities))
