class BuildError(RuntimeError):
    pass
def library():
    raise BuildError("none")
