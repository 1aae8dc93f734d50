"""Two games that are seen as pixels, small enough that an agent learns them on a CPU."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from jaxdl.environments.interface import Environment
from jaxdl.environments.pictures import channels
from jaxdl.environments.spaces import Box, Discrete


@flax.struct.dataclass
class Fall:
    """Row and column of the ball, and the column of the paddle: scalars."""

    row: PyTree
    column: PyTree
    paddle: PyTree


class Catch(Environment):
    """A ball falls from a random place in the top row; move the paddle in the bottom row left (0), not (1) or right (2): 1 if the ball is caught there, −1 if not (the Catch of bsuite, Osband et al. 2020, arXiv:1908.03568)."""

    name, frames_per_second = "catch", 5
    rows, columns = 10, 5
    time_limit = rows
    action_space = Discrete(3)
    observation_space = Box.of(0, 1, (rows, columns, 2))

    def reset(self, key: Key[Array, ""]) -> Fall:
        return Fall(
            jnp.zeros((), jnp.int32), jax.random.randint(key, (), 0, self.columns), jnp.full((), self.columns // 2, jnp.int32)
        )

    def observe(self, state: Fall) -> Float[Array, "10 5 2"]:
        """A channel for the paddle and one for the ball."""
        board = jnp.zeros(self.observation_space.shape)
        return board.at[self.rows - 1, state.paddle, 0].set(1).at[state.row, state.column, 1].set(1)

    def step(self, state: Fall, action: Int[Array, ""], key: Key[Array, ""]) -> tuple[Fall, Float[Array, ""], Bool[Array, ""]]:
        paddle = jnp.clip(state.paddle + action - 1, 0, self.columns - 1)
        after = Fall(state.row + 1, state.column, paddle.astype(jnp.int32))
        down = after.row == self.rows - 1
        return after, jnp.where(down, jnp.where(after.column == after.paddle, 1.0, -1.0), 0.0), down

    def render(self, state: Fall) -> UInt8[np.ndarray, "H W 3"]:
        board = np.zeros(self.observation_space.shape)
        board[self.rows - 1, state.paddle, 0] = board[state.row, state.column, 1] = 1
        return channels(board, [(129, 132, 203), (255, 255, 255)])


@flax.struct.dataclass
class Wall:
    """Where the ball is and was (row and column), where it flies (`DIRECTIONS`), the paddle's column, which bricks stand (`10 10`), and whether the ball has just struck one."""

    ball: PyTree
    before: PyTree
    direction: PyTree
    paddle: PyTree
    bricks: PyTree
    struck: PyTree


DIRECTIONS = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]], np.int32)
"""Rows and columns of a step up left, up right, down right, down left."""
TURNED, THROWN_BACK, REVERSED = (np.array(after, np.int32) for after in ([1, 0, 3, 2], [3, 2, 1, 0], [2, 3, 0, 1]))
"""The direction after a side wall, after the top, a brick or the paddle, and after the paddle's edge."""


class Breakout(Environment):
    """Move a paddle not (0), left (1) or right (2) so that the ball does not fall, and break bricks with it: 1 for each; a new wall comes when all are broken. The rules are those of MinAtar's Breakout without sticky actions (Young and Tian 2019, arXiv:1903.03176), cut off after 1,000 steps."""

    name, time_limit, frames_per_second = "breakout", 1000, 15
    action_space = Discrete(3)
    side = 10
    observation_space = Box.of(0, 1, (side, side, 4))

    def wall(self) -> Bool[Array, "10 10"]:
        """Three rows of bricks."""
        return jnp.zeros((self.side, self.side), bool).at[1:4].set(True)

    def reset(self, key: Key[Array, ""]) -> Wall:
        right = jax.random.bernoulli(key)
        ball = jnp.where(right, jnp.array([3, 9]), jnp.array([3, 0])).astype(jnp.int32)
        direction = jnp.where(right, 3, 2).astype(jnp.int32)
        return Wall(ball, ball, direction, jnp.full((), 4, jnp.int32), self.wall(), jnp.zeros((), bool))

    def observe(self, state: Wall) -> Float[Array, "10 10 4"]:
        """A channel each for the paddle, the ball, where it was, and bricks."""
        board = jnp.zeros(self.observation_space.shape)
        board = board.at[self.side - 1, state.paddle, 0].set(1).at[*state.ball, 1].set(1).at[*state.before, 2].set(1)
        return board.at[..., 3].set(state.bricks)

    def step(self, state: Wall, action: Int[Array, ""], key: Key[Array, ""]) -> tuple[Wall, Float[Array, ""], Bool[Array, ""]]:
        last = self.side - 1
        paddle = jnp.clip(state.paddle + jnp.array([0, -1, 1])[action], 0, last).astype(jnp.int32)
        row, column = state.ball + jnp.asarray(DIRECTIONS)[state.direction]
        beside = (column < 0) | (column > last)
        column = jnp.clip(column, 0, last)
        direction = jnp.where(beside, jnp.asarray(TURNED)[state.direction], state.direction)

        above = row < 0
        brick = ~above & state.bricks[jnp.maximum(row, 0), column]
        breaks = brick & ~state.struck  # Not two in a row: the ball first has to leave.
        bottom = ~above & ~brick & (row == last)
        bricks = state.bricks.at[jnp.maximum(row, 0), column].set(state.bricks[jnp.maximum(row, 0), column] & ~breaks)
        bricks = jnp.where(bottom & ~bricks.any(), self.wall(), bricks)
        flat, edge = bottom & (state.ball[1] == paddle), bottom & (state.ball[1] != paddle) & (column == paddle)

        direction = jnp.where(above | breaks | flat, jnp.asarray(THROWN_BACK)[direction], direction)
        direction = jnp.where(edge, jnp.asarray(REVERSED)[direction], direction)
        row = jnp.where(above, 0, jnp.where(breaks | flat | edge, state.ball[0], row))
        after = Wall(jnp.stack([row, column]).astype(jnp.int32), state.ball, direction, paddle, bricks, brick)
        return after, breaks.astype(jnp.float32), bottom & ~flat & ~edge

    def render(self, state: Wall) -> UInt8[np.ndarray, "H W 3"]:
        board = np.zeros(self.observation_space.shape)
        board[..., 0] = state.bricks
        board[*state.before, 1] = board[*state.ball, 2] = board[self.side - 1, state.paddle, 3] = 1
        return channels(board, [(202, 152, 101), (90, 90, 90), (255, 255, 255), (129, 132, 203)])
