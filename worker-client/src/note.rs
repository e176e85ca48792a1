//! What outlives a process that uploads: the upload's id, in a file, while the upload is under way.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::FlockOperation;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::error::ClientError;

/// A note that nobody came back to for so long is of no use: the service has forgotten the upload.
const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);
/// A note is a line.
const MAX_BYTES: u64 = 4096;

/// The note of one upload, held against other processes. Without a file it remembers nothing.
#[derive(Debug)]
pub(crate) struct Note {
    file: Option<(PathBuf, File)>,
    about: Value,
    upload_id: Option<String>,
}

impl Note {
    /// Opens the note of what is uploaded from `local` to `endpoint`, in a directory that is made where need be. Where another
    /// process holds it, this one remembers nothing.
    ///
    /// # Errors
    /// Where the directory or the file cannot be had.
    pub(crate) fn open(dir: Option<&Path>, endpoint: &str, local: &Path) -> Result<Self, ClientError> {
        let about = json!({ "endpoint": endpoint, "local": local.to_string_lossy() });
        let mut note = Self { file: None, about, upload_id: None };
        let Some(dir) = dir else { return Ok(note) };
        let failed = |e| ClientError::io(format!("remember the upload in {}", dir.display()), e);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        sweep(dir);
        let absolute = std::path::absolute(local).map_err(failed)?;
        let name = Sha256::digest(format!("{endpoint}\n{}", absolute.to_string_lossy()));
        let path = dir.join(format!("{}.json", hex::encode(&name[..16])));
        let open =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = open.map_err(failed)?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(note);
        }
        let mut text = String::new();
        let read = (&mut file).take(MAX_BYTES).read_to_string(&mut text);
        note.upload_id = read.ok().and_then(|_| upload_id(&text, &note.about));
        note.file = Some((path, file));
        Ok(note)
    }

    /// The upload that was left unfinished.
    pub(crate) fn upload_id(&self) -> Option<&str> {
        self.upload_id.as_deref()
    }

    /// Remembers the upload. What cannot be remembered cannot be resumed, and is no reason to stop.
    pub(crate) fn remember(&mut self, upload_id: &str) {
        self.upload_id = Some(upload_id.to_owned());
        let mut document = self.about.clone();
        document["upload_id"] = upload_id.into();
        if let Some((_, file)) = &mut self.file {
            let _ = file.set_len(0).and_then(|()| file.rewind());
            let _ = writeln!(file, "{document}");
        }
    }

    /// There is nothing to come back to: it is done, or begins anew.
    pub(crate) fn forget(&mut self) {
        self.upload_id = None;
        if let Some((path, file)) = &self.file {
            let _ = file.set_len(0);
            let _ = fs::remove_file(path);
        }
    }
}

/// The upload that a note names, where it is about the same thing.
fn upload_id(text: &str, about: &Value) -> Option<String> {
    let document: Value = serde_json::from_str(text).ok()?;
    let same = ["endpoint", "local"].iter().all(|name| document[*name] == about[*name]);
    same.then(|| document["upload_id"].as_str().map(str::to_owned)).flatten()
}

/// Removes notes that nobody came back to. What another process removes first is removed, too.
fn sweep(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|found| found.modified()).map(|modified| modified.elapsed());
        if entry.path().extension().is_some_and(|end| end == "json")
            && matches!(age, Ok(Ok(age)) if age > KEPT)
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn open(dir: &Path, local: &str) -> Note {
        Note::open(Some(dir), "http://x", Path::new(local)).expect("a note")
    }

    #[test]
    fn a_note_is_found_by_the_next_process_until_it_is_forgotten() {
        let dir = tempfile::tempdir().expect("temp dir");
        let dir = &dir.path().join("a/b");
        let mut note = open(dir, "/data");
        assert_eq!(note.upload_id(), None);
        note.remember("one");
        note.remember("two");
        let mut second = open(dir, "/data");
        assert_eq!(second.upload_id(), None, "the first one still holds it");
        second.remember("three");
        drop((note, second));
        assert_eq!(open(dir, "/other").upload_id(), None);
        let mut note = open(dir, "/data");
        assert_eq!(note.upload_id(), Some("two"));
        note.forget();
        drop(note);
        assert_eq!(open(dir, "/data").upload_id(), None);
        let mut nothing = Note::open(None, "http://x", Path::new("/data")).expect("no note");
        nothing.remember("x");
        nothing.forget();
    }

    #[test]
    fn what_is_old_or_no_note_is_not_believed() {
        let dir = tempfile::tempdir().expect("temp dir");
        open(dir.path(), "/data").remember("one");
        let path =
            fs::read_dir(dir.path()).expect("a folder").next().expect("a note").expect("a note").path();
        fs::write(&path, "{").expect("write");
        assert_eq!(open(dir.path(), "/data").upload_id(), None);
        fs::write(&path, r#"{"endpoint":"http://y","local":"/data","upload_id":"x"}"#).expect("write");
        assert_eq!(open(dir.path(), "/data").upload_id(), None, "another service's");
        let file = File::options().write(true).open(&path).expect("open");
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000)).expect("make it old");
        open(dir.path(), "/other");
        assert!(!path.exists());
    }
}
