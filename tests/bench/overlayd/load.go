package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"sync"
	"sync/atomic"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

const (
	plugin = "bench"
	layers = 20
	top    = "chain-19"
)

type result struct {
	Milliseconds []float64 `json:"ms"`
	Seconds      float64   `json:"seconds"`
}

func check(err error) {
	if err != nil && status.Code(err) != codes.AlreadyExists {
		log.Fatal(err)
	}
}

type load struct {
	ctx context.Context
	sn  api.SnapshotsClient
}

func (l load) prepare(key, parent string) {
	_, err := l.sn.Prepare(l.ctx, &api.PrepareSnapshotRequest{
		Snapshotter: plugin, Key: key, Parent: parent, Labels: map[string]string{"containerd.io/gc.root": "now"},
	})
	check(err)
}

func (l load) commit(name, key string) {
	_, err := l.sn.Commit(l.ctx, &api.CommitSnapshotRequest{Snapshotter: plugin, Name: name, Key: key})
	check(err)
}

func (l load) stat(key string) error {
	_, err := l.sn.Stat(l.ctx, &api.StatSnapshotRequest{Snapshotter: plugin, Key: key})
	return err
}

func (l load) list(filters ...string) {
	stream, err := l.sn.List(l.ctx, &api.ListSnapshotsRequest{Snapshotter: plugin, Filters: filters})
	for err == nil {
		_, err = stream.Recv()
	}
	if err != io.EOF {
		log.Fatal(err)
	}
}

func (l load) populate(others int) {
	parent := ""
	for n := range layers {
		name := fmt.Sprintf("chain-%d", n)
		if l.stat(name) != nil {
			l.prepare("layer-"+name, parent)
			l.commit(name, "layer-"+name)
		}
		parent = name
	}
	run(8, others, func(n int) {
		if key := fmt.Sprintf("other-%d", n); l.stat(key) != nil {
			l.prepare(key, top)
		}
	})
}

// run makes `calls` calls from `clients` goroutines; call n gets the number n.
func run(clients, calls int, call func(n int)) result {
	found := result{Milliseconds: make([]float64, calls)}
	var next atomic.Int64
	var group sync.WaitGroup
	begin := time.Now()
	for range clients {
		group.Go(func() {
			for n := int(next.Add(1)) - 1; n < calls; n = int(next.Add(1)) - 1 {
				start := time.Now()
				call(n)
				found.Milliseconds[n] = float64(time.Since(start).Microseconds()) / 1000
			}
		})
	}
	group.Wait()
	found.Seconds = time.Since(begin).Seconds()
	return found
}

// measure calls the snapshotter at `socket` as containerd does, over one connection. A chain of 20 layers and `others` more
// snapshots are made unless they are there. Then `clients` callers share `calls` calls of each operation.
func measure(socket string, others, clients, calls int) map[string]result {
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	l := load{metadata.AppendToOutgoingContext(context.Background(), "containerd-namespace", "bench"), api.NewSnapshotsClient(connection)}
	l.populate(others)

	key := func(n int) string { return fmt.Sprintf("key-%d", n) }
	name := func(n int) string { return fmt.Sprintf("name-%d", n) }
	found := map[string]result{}
	found["Prepare"] = run(clients, calls, func(n int) { l.prepare(key(n), top) })
	found["Mounts"] = run(clients, calls, func(n int) {
		_, err := l.sn.Mounts(l.ctx, &api.MountsRequest{Snapshotter: plugin, Key: key(n)})
		check(err)
	})
	found["Stat"] = run(clients, calls, func(n int) { check(l.stat(key(n))) })
	found["Usage"] = run(clients, calls, func(n int) {
		_, err := l.sn.Usage(l.ctx, &api.UsageRequest{Snapshotter: plugin, Key: key(n)})
		check(err)
	})
	found["Update"] = run(clients, calls, func(n int) {
		_, err := l.sn.Update(l.ctx, &api.UpdateSnapshotRequest{
			Snapshotter: plugin,
			Info:        &api.Info{Name: key(n), Labels: map[string]string{"number": name(n)}},
			UpdateMask:  &fieldmaskpb.FieldMask{Paths: []string{"labels.number"}},
		})
		check(err)
	})
	found["List of one"] = run(clients, min(calls, 20), func(n int) { l.list(fmt.Sprintf(`labels."number"==%s`, name(n))) })
	found["List"] = run(clients, min(calls, 20), func(int) { l.list() })
	found["Commit"] = run(clients, calls, func(n int) { l.commit(name(n), key(n)) })
	found["Remove"] = run(clients, calls, func(n int) {
		_, err := l.sn.Remove(l.ctx, &api.RemoveSnapshotRequest{Snapshotter: plugin, Key: name(n)})
		check(err)
	})
	_, err = l.sn.Cleanup(l.ctx, &api.CleanupRequest{Snapshotter: plugin})
	check(err)
	return found
}
