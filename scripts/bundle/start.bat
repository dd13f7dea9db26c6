@echo off
rem Windows: a double click.
where py >nul 2>nul
if not errorlevel 1 (
    py -3 -B "%~dp0start.py" %*
    goto done
)
where python >nul 2>nul
if not errorlevel 1 (
    python -B "%~dp0start.py" %*
    goto done
)
echo error: no Python here; install Python 3.11 or newer, then start this again. Nothing was installed
:done
pause
