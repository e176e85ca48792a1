use runner_core::spec::Output;

use super::*;

fn output(path: &str, glob: bool, max_bytes: Option<u64>) -> Output {
    Output { path: path.to_owned(), destination: None, required: false, max_bytes, glob }
}

/// What is wanted of `/outputs`.
fn wanted(outputs: Vec<Output>) -> Wanted {
    let spec = RunSpec { outputs, ..RunSpec::default() };
    let plan = convert::mount_plan(&spec).unwrap();
    let mount = plan.mounts.iter().position(|mount| mount.target == "/outputs").unwrap();
    Wanted::of(&spec, &plan, mount, &StagingLimits::default())
}

enum Thing<'a> {
    Dir,
    File(&'a [u8]),
    Link(&'a str),
    Symlink(&'a str),
    Fifo,
}

fn tar(things: &[(&str, Thing<'_>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, thing) in things {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(0);
        let mut link = |header: &mut tar::Header, kind, target: &str| {
            header.set_entry_type(kind);
            tar.append_link(header, path, target).unwrap();
        };
        let (kind, bytes): (EntryType, &[u8]) = match thing {
            Thing::Link(target) => {
                link(&mut header, EntryType::Link, target);
                continue;
            }
            Thing::Symlink(target) => {
                link(&mut header, EntryType::Symlink, target);
                continue;
            }
            Thing::Dir => (EntryType::Directory, b""),
            Thing::File(bytes) => (EntryType::Regular, bytes),
            Thing::Fifo => (EntryType::Fifo, b""),
        };
        header.set_entry_type(kind);
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, path, bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

fn unpacked(things: &[(&str, Thing<'_>)], wanted: Wanted) -> (tempfile::TempDir, Vec<PathBuf>) {
    let temp = tempfile::tempdir().unwrap();
    let tar = tar(things);
    let mut archive = tar::Archive::new(tar.as_slice());
    let root = Root::open(temp.path()).unwrap();
    let links = unpack_entries(&mut archive, &root, wanted).unwrap().links;
    (temp, links)
}

fn read(temp: &tempfile::TempDir, path: &str) -> Option<Vec<u8>> {
    std::fs::read(temp.path().join(path)).ok()
}

#[test]
fn only_what_an_output_names_is_put_on_the_disk() {
    let things = [
        ("outputs", Thing::Dir),
        ("outputs/a", Thing::File(b"a")),
        ("outputs/b", Thing::File(b"b")),
        ("outputs/dir", Thing::Dir),
        ("outputs/dir/c", Thing::File(b"c")),
        ("outputs/other", Thing::Dir),
        ("outputs/other/d", Thing::File(b"d")),
    ];
    let (temp, _) = unpacked(
        &things,
        wanted(vec![output("/outputs/a", false, None), output("/outputs/dir", false, None)]),
    );
    assert_eq!(read(&temp, "a").unwrap(), b"a");
    assert_eq!(read(&temp, "dir/c").unwrap(), b"c");
    assert!(read(&temp, "b").is_none() && !temp.path().join("other").exists());
}

#[test]
fn a_pattern_takes_what_it_matches_and_other_files_do_not_use_up_its_limit() {
    let things = [
        ("outputs", Thing::Dir),
        ("outputs/big.bin", Thing::File(&[7; 1000])),
        ("outputs/mine.txt", Thing::File(&[8; 1000])),
        ("outputs/x.txt", Thing::File(b"text")),
        ("outputs/y.txt", Thing::File(b"more")),
    ];
    let outputs = vec![output("/outputs/*.txt", true, Some(8)), output("/outputs/mine.txt", false, None)];
    let (temp, _) = unpacked(&things, wanted(outputs));
    assert_eq!(read(&temp, "x.txt").unwrap(), b"text");
    assert_eq!(read(&temp, "y.txt").unwrap(), b"more");
    assert_eq!(read(&temp, "mine.txt").unwrap(), [8; 1000]);
    assert!(read(&temp, "big.bin").is_none());
}

#[test]
fn a_pattern_reaches_into_directories_that_are_no_outputs_themselves() {
    let things = [
        ("outputs", Thing::Dir),
        ("outputs/a", Thing::Dir),
        ("outputs/a/x.txt", Thing::File(b"x")),
        ("outputs/b", Thing::Dir),
        ("outputs/b/y.bin", Thing::File(b"y")),
        ("outputs/hit.d", Thing::Dir),
        ("outputs/hit.d/sub", Thing::Dir),
        ("outputs/hit.d/sub/z", Thing::File(b"z")),
    ];
    let outputs = vec![output("/outputs/*/*.txt", true, None), output("/outputs/*.d", true, None)];
    let (temp, _) = unpacked(&things, wanted(outputs));
    assert_eq!(read(&temp, "a/x.txt").unwrap(), b"x");
    assert_eq!(read(&temp, "hit.d/sub/z").unwrap(), b"z");
    assert!(!temp.path().join("b").exists());
}

#[test]
fn above_its_limit_an_output_keeps_its_length_and_not_its_bytes() {
    let things = [("outputs", Thing::Dir), ("outputs/a", Thing::File(&[7; 100_000]))];
    let (temp, _) = unpacked(&things, wanted(vec![output("/outputs/a", false, Some(10))]));
    let bytes = read(&temp, "a").unwrap();
    assert_eq!(bytes.len(), 100_000, "publishing sees that it is too large");
    assert_eq!(bytes.iter().filter(|byte| **byte == 7).count(), 11, "the disk does not");
}

#[test]
fn hard_links_become_files_and_other_links_lead_nowhere() {
    let things = [
        ("outputs", Thing::Dir),
        ("outputs/a", Thing::File(b"a")),
        ("outputs/b", Thing::Link("outputs/a")),
        ("outputs/fifo", Thing::Fifo),
        ("outputs/out", Thing::Symlink("/etc")),
    ];
    let (temp, links) = unpacked(&things, wanted(vec![output("/outputs", false, None)]));
    assert_eq!(read(&temp, "b").unwrap(), b"a");
    assert!(links.is_empty());
    assert_eq!(std::fs::read_link(temp.path().join("out")).unwrap(), Path::new("nowhere"));
    assert!(!temp.path().join("fifo").metadata().unwrap().is_file());
}

#[test]
fn a_hard_link_to_what_is_not_wanted_is_fetched_by_its_own_name() {
    let things = [
        ("outputs", Thing::Dir),
        ("outputs/scratch", Thing::File(b"bytes")),
        ("outputs/sub", Thing::Dir),
        ("outputs/sub/result", Thing::Link("outputs/scratch")),
    ];
    let (_temp, links) = unpacked(&things, wanted(vec![output("/outputs/sub", false, None)]));
    assert_eq!(links, [PathBuf::from("sub/result")]);
}

#[test]
fn a_tar_that_lies_gets_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap().to_owned();
    let things = [
        ("outputs", Thing::Dir),
        ("outputs/link", Thing::Symlink(&target)),
        ("outputs/link/file", Thing::File(b"x")),
    ];
    let temp = tempfile::tempdir().unwrap();
    let bytes = tar(&things);
    let root = Root::open(temp.path()).unwrap();
    let wanted = wanted(vec![output("/outputs", false, None)]);
    assert!(unpack_entries(&mut tar::Archive::new(bytes.as_slice()), &root, wanted).is_err());
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(below_top(Path::new("outputs/../../etc")), None);
    assert_eq!(below_top(Path::new("outputs")), Some(PathBuf::new()));
}
