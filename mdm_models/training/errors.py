"""What the user of a training run can mend."""


class TrainingError(Exception):
    """The run cannot start or go on; the message is one line, says what is wrong and names the file it is about."""


class DataError(TrainingError):
    """The data cannot be trained on."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, read or used."""
