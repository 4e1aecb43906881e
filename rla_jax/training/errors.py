"""Errors that a user can act on: the command line prints them as one line, without a traceback."""


class TrainingError(Exception):
  """Base of the errors below; the message says what was found and what was expected."""


class ConfigError(TrainingError, ValueError):
  """A key or value of the config, or a combination of them, cannot be used."""


class WorkdirError(TrainingError):
  """The working directory belongs to another config, is in use, or cannot be written."""


class CheckpointError(TrainingError):
  """No checkpoint can be restored, or one could not be saved."""


class DivergedError(TrainingError):
  """Too many steps in a row had to be skipped."""
