//! Puts a filled folder where another one may stand, by one rename wherever the system has one for it.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The end of the name of a folder that holds what was moved aside, beside the folder that took its place.
pub(super) const ASIDE: &str = ".earlier";

/// Puts `filled` at `target`. Returns where what stood there before stands afterwards: at `filled`, or, where the system has
/// no exchange, under its own name in a folder beside it.
pub(super) fn place(filled: &Path, target: &Path) -> io::Result<Option<PathBuf>> {
    // Another run may come or go between the two renames: then it is the other one's turn.
    for _ in 0..100 {
        match rename(filled, target, How::WhereNothingIs) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) if is_unknown(&error) => return in_two_steps(filled, target),
            done => return done.map(|()| None),
        }
        match rename(filled, target, How::Exchange) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if is_unknown(&error) => return in_two_steps(filled, target),
            done => return done.map(|()| Some(filled.to_owned())),
        }
    }
    Err(io::Error::other("other runs come and go in its place"))
}

/// Undoes [`place`], which returned `earlier`.
pub(super) fn put_back(earlier: &Path, filled: &Path, target: &Path) -> io::Result<()> {
    if earlier == filled {
        return rename(filled, target, How::Exchange);
    }
    std::fs::rename(target, filled)?;
    std::fs::rename(earlier, target)?;
    earlier.parent().map_or(Ok(()), std::fs::remove_dir)
}

#[derive(Debug, Clone, Copy)]
enum How {
    WhereNothingIs,
    Exchange,
}

#[cfg(target_os = "linux")]
fn rename(from: &Path, to: &Path, how: How) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let flags = match how {
        How::WhereNothingIs => RenameFlags::NOREPLACE,
        How::Exchange => RenameFlags::EXCHANGE,
    };
    Ok(renameat_with(CWD, from, CWD, to, flags)?)
}

#[cfg(not(target_os = "linux"))]
fn rename(_from: &Path, _to: &Path, _how: How) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// The kernel or the file system has no such rename.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput)
}

/// For file systems without an exchange: between the two renames nothing stands at `target`, and a process that is killed
/// there leaves to the next run to put it back.
fn in_two_steps(filled: &Path, target: &Path) -> io::Result<Option<PathBuf>> {
    let mut aside = filled.to_owned().into_os_string();
    aside.push(ASIDE);
    let aside = PathBuf::from(aside);
    let earlier = aside.join(target.file_name().unwrap_or_default());
    std::fs::create_dir(&aside)?;
    let replaces = match std::fs::rename(target, &earlier) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        renamed => renamed.map(|()| true),
    };
    let placed = replaces.and_then(|replaces| std::fs::rename(filled, target).map(|()| replaces));
    if !matches!(placed, Ok(true)) {
        // Best effort: the error that is told is the first one.
        let _ = std::fs::rename(&earlier, target);
        let _ = std::fs::remove_dir(&aside);
    }
    placed.map(|replaces| replaces.then_some(earlier))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rename_and_two_come_to_the_same() {
        for how in [place, in_two_steps] {
            let folder = tempfile::tempdir().unwrap();
            let (filled, target) = (folder.path().join("filled"), folder.path().join("target"));
            for text in ["first", "second"] {
                std::fs::create_dir(&filled).unwrap();
                std::fs::write(filled.join("text"), text).unwrap();
                let earlier = how(&filled, &target).unwrap();
                assert_eq!(std::fs::read_to_string(target.join("text")).unwrap(), text);
                assert_eq!(earlier.is_some(), text == "second");
                if let Some(earlier) = earlier {
                    assert_eq!(std::fs::read_to_string(earlier.join("text")).unwrap(), "first");
                    put_back(&earlier, &filled, &target).unwrap();
                    assert_eq!(std::fs::read_to_string(target.join("text")).unwrap(), "first");
                    assert_eq!(std::fs::read_to_string(filled.join("text")).unwrap(), "second");
                }
            }
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn a_rename_that_fails_leaves_the_earlier_folder() {
        for how in [place, in_two_steps] {
            let folder = tempfile::tempdir().unwrap();
            let target = folder.path().join("target");
            std::fs::create_dir(&target).unwrap();
            assert!(how(&folder.path().join("none"), &target).is_err());
            assert!(target.is_dir());
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_place_that_many_write_to_is_always_whole() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let (folder, target) = (folder.path(), &target);
                scope.spawn(move || {
                    for round in 0..50 {
                        let filled = folder.join(format!("{writer}.{round}"));
                        std::fs::create_dir(&filled).unwrap();
                        std::fs::write(filled.join("text"), "whole").unwrap();
                        place(&filled, target).unwrap();
                        let _ = std::fs::remove_dir_all(&filled);
                    }
                });
            }
        });
        assert_eq!(std::fs::read_to_string(target.join("text")).unwrap(), "whole");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
