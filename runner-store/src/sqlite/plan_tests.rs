//! Rule 8: the cost of a verb on one run does not grow with the number of finished runs. Checked on the plans, not on the
//! clock: no statement of such a verb scans a table, and no listing sorts.

use std::collections::BTreeMap;

use runner_core::{
    clock::Timestamp,
    id::RunId,
    shadow::PairFilter,
    state::RunState,
    store::{PageCursor, RunFilter},
};
use rusqlite::{Connection, params};

use super::{migrate, pairs, read, write};

fn database() -> Connection {
    let mut conn = Connection::open_in_memory().unwrap();
    migrate::migrate(&mut conn, std::path::Path::new("x"), migrate::MIGRATIONS).unwrap();
    conn
}

fn plan(conn: &Connection, sql: &str) -> Vec<String> {
    let mut statement = conn.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
    // The plan does not depend on the values; what is not bound is NULL.
    let mut rows = statement.raw_query();
    let mut plan = Vec::new();
    while let Some(row) = rows.next().unwrap() {
        plan.push(row.get::<_, String>(3).unwrap());
    }
    plan
}

/// 100,000 finished runs and ten live ones, with statistics, so that the planner knows how much there is.
fn fill(conn: &Connection) {
    conn.execute_batch(
        "BEGIN;
         WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100010)
         INSERT INTO runs (rn, id, tenant, key, digest, state, attempt, backend, backend_reason, created, ended, outcome, last_event)
         SELECT i, randomblob(16), 't' || (i % 3), 'k' || i, x'00', iif(i > 100000, 'RUNNING', 'SUCCEEDED'), 1, 'local', '',
                i, iif(i > 100000, NULL, i), iif(i > 100000, NULL, '{}'), 2 FROM n;
         INSERT INTO specs SELECT rn, '{}' FROM runs;
         INSERT INTO labels SELECT 'team', 'x', created, id, rn FROM runs;
         INSERT INTO events SELECT rn, 1, created, '{}' FROM runs;
         INSERT INTO events SELECT rn, 2, created, '{}' FROM runs;
         INSERT INTO attempts SELECT rn, 1, 'local', NULL, created, '{}' FROM runs;
         INSERT INTO timers SELECT rn, 'deadline', 1, 1 FROM runs WHERE ended IS NULL;
         INSERT INTO pairs (primary_id, shadow_id, tenant, primary_backend, shadow_backend, stage, since, judged, differs)
         SELECT id, randomblob(16), 't', 'a', 'b', iif(ended IS NULL, 'running', 'compared'), 1, ended, rn % 1000 = 0 FROM runs;
         COMMIT;
         ANALYZE;",
    )
    .unwrap();
}

const OF_ONE_RUN: &[&str] = &[
    read::GET,
    read::RN,
    read::ATTEMPTS,
    read::EVENTS,
    read::SWEPT,
    write::ENDED,
    write::SET_SWEPT,
    write::REMOVE[0],
    write::REMOVE[1],
    write::REMOVE[2],
    write::REMOVE[3],
    write::REMOVE[4],
    write::REMOVE[5],
    write::REMOVE[6],
    write::REMOVE[7],
    write::BEGIN_REMOVAL,
    write::INSERT_NAMED,
    read::NAMES_UPLOAD,
    write::INSERT_RUN,
    write::FIRST_TRAFFIC,
    write::INSERT_AUDIT,
    read::AUDIT,
    write::INSERT_SPEC,
    write::INSERT_LABEL,
    write::INSERT_EVENT,
    write::INSERT_ATTEMPT,
    write::INSERT_TIMER,
    write::DELETE_TIMERS,
    write::BY_ID,
    write::BY_KEY,
    write::MOVE,
    write::END,
    write::NEXT_EVENT,
    write::CANCEL,
    pairs::INSERT,
    pairs::BEGIN,
    pairs::JUDGE,
    pairs::SHADOW_REMOVED,
    pairs::ORPHAN,
    pairs::PRIMARY_REMOVED,
    pairs::BY_RUN,
    pairs::OPEN,
];

#[test]
fn no_verb_on_one_run_scans_a_table() {
    let conn = database();
    for filled in [false, true] {
        if filled {
            fill(&conn);
        }
        for sql in OF_ONE_RUN {
            let plan = plan(&conn, sql);
            assert!(!plan.iter().any(|line| line.contains("SCAN")), "{sql}\n{plan:#?}");
            assert!(!plan.iter().any(|line| line.contains("TEMP B-TREE")), "{sql}\n{plan:#?}");
        }
    }
}

#[test]
fn what_a_restart_reads_is_found_by_the_index_of_live_runs() {
    let conn = database();
    fill(&conn);
    let of_live = plan(&conn, read::LIVE);
    assert!(of_live[0].contains("runs_live"), "{of_live:#?}");
    let of_timers = plan(&conn, read::LIVE_TIMERS);
    // Timers belong to live runs only, so the outer loop is small; the inner one must be a search.
    assert!(of_timers[0].starts_with("SCAN t"), "{of_timers:#?}");
    assert!(of_timers[1].starts_with("SEARCH r"), "{of_timers:#?}");
    for plan in [of_live, of_timers] {
        assert!(!plan.iter().any(|line| line.contains("TEMP B-TREE")), "{plan:#?}");
    }
}

#[test]
fn a_sweep_reads_in_the_order_of_ends_and_a_restart_finds_what_is_being_removed() {
    let conn = database();
    fill(&conn);
    let of_ended = plan(&conn, read::ENDED);
    assert!(of_ended[0].starts_with("SEARCH") && of_ended[0].contains("runs_ended"), "{of_ended:#?}");
    let of_removals = plan(&conn, read::REMOVALS);
    // Few runs are being removed at once, so the outer loop is small; the inner one must be a search.
    assert!(of_removals[0].starts_with("SCAN m"), "{of_removals:#?}");
    assert!(of_removals[1].starts_with("SEARCH r"), "{of_removals:#?}");
    for plan in [of_ended, of_removals] {
        assert!(!plan.iter().any(|line| line.contains("TEMP B-TREE")), "{plan:#?}");
    }
}

#[test]
fn no_listing_sorts_and_a_cursor_is_a_place_in_an_index() {
    let conn = database();
    fill(&conn);
    let all = RunFilter::default();
    let labels = |n: usize| (0..n).map(|i| (format!("l{i}"), "x".to_owned())).collect::<BTreeMap<_, _>>();
    let filters = [
        (all.clone(), "runs_created"),
        (RunFilter { tenant: "a".parse().ok(), ..all.clone() }, "runs_tenant_created"),
        (RunFilter { states: vec![RunState::Failed], ..all.clone() }, "runs_created"),
        (RunFilter { states: vec![RunState::Running, RunState::Queued], ..all.clone() }, "runs_live"),
        (RunFilter { tenant: "a".parse().ok(), states: vec![RunState::Running], ..all.clone() }, "runs_live"),
        (RunFilter { labels: labels(1), ..all.clone() }, "PRIMARY KEY"),
        (RunFilter { labels: labels(3), tenant: "a".parse().ok(), ..all.clone() }, "PRIMARY KEY"),
        (RunFilter { created_from: Some(Timestamp::from_micros(5)), ..all }, "runs_created"),
    ];
    let cursor = PageCursor { created: Timestamp::from_micros(7), id: RunId::new(uuid::Uuid::from_u128(1)) };
    for (filter, index) in filters {
        let (sql, _) = read::list_sql(&filter, Some(cursor));
        let plan = plan(&conn, &sql);
        assert!(plan[0].starts_with("SEARCH"), "{filter:?}\n{plan:#?}");
        assert!(plan[0].contains(index) && plan[0].contains("created"), "{filter:?}\n{plan:#?}");
        assert!(!plan.iter().any(|line| line.contains("SCAN") || line.contains("TEMP B-TREE")), "{plan:#?}");
        let (sql, _) = read::list_sql(&filter, None);
        assert!(!self::plan(&conn, &sql).iter().any(|line| line.contains("TEMP B-TREE")), "{sql}");
    }
}

#[test]
fn no_listing_of_pairs_sorts_or_begins_anew() {
    let conn = database();
    fill(&conn);
    for differing in [false, true] {
        for image in [None, Some("x".to_owned())] {
            let filter = PairFilter { image, differing, ..PairFilter::default() };
            let plan = plan(&conn, &pairs::list_sql(&filter, Some(7)).0);
            assert!(plan[0].starts_with("SEARCH pairs"), "{plan:#?}");
            assert_eq!(plan[0].contains("pairs_differing"), differing, "{plan:#?}");
            assert!(!plan.iter().any(|line| line.contains("TEMP B-TREE")), "{plan:#?}");
        }
    }
}

#[test]
fn a_finished_run_is_not_in_the_index_of_live_runs() {
    let conn = database();
    fill(&conn);
    let count = |sql: &str| conn.query_row(sql, (), |row| row.get::<_, i64>(0)).unwrap();
    let live = "SELECT count(*) FROM runs INDEXED BY runs_live WHERE ended IS NULL";
    assert_eq!(count(live), 10);
    conn.execute("UPDATE runs SET ended = 1 WHERE rn = ?1", params![100_001]).unwrap();
    assert_eq!(count(live), 9);
}
